"""What a trained model is worth: `perplexity` of a token stream, and text to look at by `generate`."""
