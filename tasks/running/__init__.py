"""How a stage is run: seeds that do not depend on order, progress, and retries."""
