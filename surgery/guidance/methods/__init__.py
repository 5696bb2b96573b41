"""One module for each method: its formula, source, defaults, cost and layers."""

from .apg import Apg
from .autoguidance import AutoGuidance
from .cfg import Cfg
from .cfg_zero import CfgZero
from .nag import Nag
from .oseg import Oseg
from .pag import Pag
from .sag import Sag
from .seg import Seg
from .slg import Slg
from .stg import Stg
from .tsg import Tsg

CARRIED_OUT = {
    "cfg": Cfg,
    "apg": Apg,
    "cfg-zero": CfgZero,
    "pag": Pag,
    "seg": Seg,
    "oseg": Oseg,
    "sag": Sag,
    "slg": Slg,
    "stg": Stg,
    "autoguidance": AutoGuidance,
    "tsg": Tsg,
    "nag": Nag,
}
