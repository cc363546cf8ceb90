"""`python -m gemma_export`, which torchrun starts as ranks with `torchrun … -m gemma_export`."""

from gemma_export.start import main

if __name__ == "__main__":
    main()
