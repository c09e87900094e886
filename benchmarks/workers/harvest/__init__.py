"""Workers that read the activations of one site of a language model."""
