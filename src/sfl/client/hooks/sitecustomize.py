"""Prepares a training script's process for its site, then makes way for the sitecustomize that would have run.

Its folder stands on ``PYTHONPATH`` of scripts that run as processes of their own, and nowhere else.
"""

from sfl.client.child import begin
from sfl.utils.sitehook import make_way

begin()
make_way(__file__)
