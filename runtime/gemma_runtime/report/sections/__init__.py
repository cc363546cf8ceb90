"""The sections of the page, each from what is known about its subject."""
