"""Auditing a guard: how strongly a model's refusals resist being taken out. What the numbers mean: docs/audit.md."""

from abliterate.audit.stages import audit as audit
from abliterate.settings.audit import AuditRunSettings as AuditRunSettings
