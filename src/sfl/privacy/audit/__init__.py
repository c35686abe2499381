"""Audits: a lower bound on ε that is measured, beside the upper bound that the ledger claims.

``PrivacyAuditor.run_audit`` sends canaries through one mechanism; ``run_pipeline_audit`` through anything, such as a
whole run (``sfl.audit.RecipePipeline``). ``check_norm_bound`` finds what statistics cannot: a clip a little off.
"""

from sfl.privacy.audit.auditor import Pipeline, PrivacyAuditor
from sfl.privacy.audit.norm import NormCheck, check_norm_bound
from sfl.privacy.audit.one_run import epsilon_lower_bound, lower_bound, one_run_p_value, strongest_bound
from sfl.privacy.audit.report import AuditReport

__all__ = [
    "AuditReport",
    "NormCheck",
    "Pipeline",
    "PrivacyAuditor",
    "check_norm_bound",
    "epsilon_lower_bound",
    "lower_bound",
    "one_run_p_value",
    "strongest_bound",
]
