"""Skip the experts that do not matter: MoDES for mixture-of-experts multimodal LLMs, as a compiler pass."""

from modes_fx import demo as demo
from modes_fx.aot.export import export as export
from modes_fx.aot.loaded import ExportedModel as ExportedModel
from modes_fx.aot.loaded import load as load
from modes_fx.attach import Attached as Attached
from modes_fx.attach import attach as attach
from modes_fx.backend import Backend as Backend
from modes_fx.backend import backend as backend
from modes_fx.calibration.calibrate import calibrate as calibrate
from modes_fx.controller import Controller as Controller
from modes_fx.errors import ExportError as ExportError
from modes_fx.errors import ModesError as ModesError
from modes_fx.errors import ProfileError as ProfileError
from modes_fx.errors import RewriteError as RewriteError
from modes_fx.errors import SearchError as SearchError
from modes_fx.explain import explain as explain
from modes_fx.exported import rewrite as rewrite
from modes_fx.profile import Layer as Layer
from modes_fx.profile import Profile as Profile
from modes_fx.threshold_search.points import Frontier as Frontier
from modes_fx.threshold_search.search import frontier as frontier
from modes_fx.threshold_search.search import search as search
from modes_fx.threshold_search.targets import Target as Target
