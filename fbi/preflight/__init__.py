"""What a run would need on machines that are not here: the real step, compiled from shapes for a named target."""
