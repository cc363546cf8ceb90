"""Text in and out: tokenizer, chat template, sampler, generation."""
