"""The stages of a run, one file each, and in the folders what they are made of. Each stage: inputs, key, make, commit."""
