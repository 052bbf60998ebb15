"""Run directories as tables, pictures and text. Reads files only and never imports JAX, so that it runs anywhere."""
