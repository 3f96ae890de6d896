"""Training an edited model back to what the edit cost: preference tuning (`dpo`), the original as teacher (`self`).

Nothing heavy is imported here; take `settings`, `training` and the presets' modules by name.
"""
