"""Does the artifact agree with the checkpoint? Goldens, verify, eval."""
