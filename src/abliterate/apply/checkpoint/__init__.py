"""An edit in a folder of safetensors shards, streamed from disk to disk."""
