"""Auditing a guard: how strongly a model's refusals resist being taken out. What the numbers mean: docs/audit.md."""

from abliterate.audit.audit import audit as audit
from abliterate.audit.settings import AuditRunSettings as AuditRunSettings
