"""The stages of a run, one file each; the folders hold their parts. Each stage has one shape: inputs, key, make, commit."""
