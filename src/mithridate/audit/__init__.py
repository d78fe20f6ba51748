"""An audit: what one batch, or a stream of them, could do to a user's own model; pass, fail or inconclusive."""

from mithridate.audit.auditor import run as run
from mithridate.audit.plan import AuditPlan as AuditPlan
from mithridate.audit.plan import plan_of as plan_of
from mithridate.audit.plan import read_plan as read_plan
from mithridate.audit.result import Audited as Audited
from mithridate.audit.target import Target as Target
