"""Low-bit formats of Hugging Face directories, a file each: stored words to codes, scales and zeros, exactly."""
