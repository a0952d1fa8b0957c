"""How a stage is run: seeds that do not depend on order, progress, retries, and children that end with the process."""
