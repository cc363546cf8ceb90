"""Files next to the artifact: goldens, teacher, tokenizer and chat template for phones."""
