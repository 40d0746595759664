"""Makes the configs and the method of `c2bin_solo` known to solo-learn's own scripts.

Hydra imports this module in every Hydra program of the machine: nothing but Hydra is imported until
the program turns out to be one of solo-learn's.
"""

from __future__ import annotations

import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

__all__ = ["C2BINSoloSearchPath"]


class C2BINSoloSearchPath(SearchPathPlugin):
    """Register C2BIN where solo-learn's methods are already imported; elsewhere do nothing."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the configs, after those of the program itself.

        Args:
            search_path: Of the Hydra program that is starting.
        """
        # The scripts import solo-learn at their top, so before Hydra looks for plugins.
        if "solo.methods" not in sys.modules:
            return
        import c2bin_solo

        c2bin_solo.register()
        search_path.append("c2bin-ext", "pkg://c2bin_solo.configs")
