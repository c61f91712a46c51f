"""Rules applied to a Linen module, and the table of what they do."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from jaxquant import calibration as calibrations
from jaxquant.attention import Attention
from jaxquant.calibration import Range
from jaxquant.conv import ConvGeneralDilated
from jaxquant.coverage import Coverage, Row, Tagged, find_products, tag
from jaxquant.dot import DotGeneral
from jaxquant.linen.sites import (
    Operation,
    Product,
    Site,
    Use,
    attributes,
    call_with,
    check_slot,
    site_of,
)
from jaxquant.linen.weights import RANGES, Weight, at, abstractly, weight_used
from jaxquant.qarray import QArray
from jaxquant.recipes import describe
from jaxquant.rules import ATTENTION, Rule, Rules, assign, parse_rules
