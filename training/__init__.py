"""The recipe of the embedded checkpoint: scenes, tokenizers, model, training, evaluation, export."""
