"""The table of export formats. A new one is a module with a `Target`, and a line here."""

from exporting import llava, vipllava
from exporting.stock import Target

# value of --format → target; the first is the default
TARGETS: dict[str, Target] = {"llava": llava.TARGET, "vipllava": vipllava.TARGET}
