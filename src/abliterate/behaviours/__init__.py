"""Behaviours as data: what contrasts, what judges, and whether it is taken out or put in."""

from abliterate.behaviours.definition import BUNDLED as BUNDLED
from abliterate.behaviours.definition import Behaviour as Behaviour
from abliterate.behaviours.definition import Pair as Pair
from abliterate.behaviours.definition import load_behaviour as load_behaviour
