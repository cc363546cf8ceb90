"""Files beside the artifact: goldens, teacher, tokenizer and chat template for phones."""
