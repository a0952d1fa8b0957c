"""The trainer: the student and its objective as one module, batches from committed shards, adapters, several processes."""
