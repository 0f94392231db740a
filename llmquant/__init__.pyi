"""The public names and where they live: the one list, for type checkers and at run time."""

from .checkpoint.atomic import check_destination as check_destination
from .checkpoint.atomic import lock_folder as lock_folder
from .checkpoint.atomic import put_in_place as put_in_place
from .checkpoint.card import MEASURED_END as MEASURED_END
from .checkpoint.card import MEASURED_START as MEASURED_START
from .checkpoint.companions.originals import refuse_source as refuse_source
from .checkpoint.gguf.folder import ImportResult as ImportResult
from .checkpoint.hub import resolve as resolve
from .checkpoint.inspect import Inspection as Inspection
from .checkpoint.inspect import inspect as inspect
from .checkpoint.manifest import verify as verify
from .checkpoint.weights.exported import is_onnx as is_onnx
from .conversion import (
    ConvertOptions as ConvertOptions,
)
from .conversion import (
    ConvertResult as ConvertResult,
)
from .conversion import (
    convert as convert,
)
from .conversion.gguf.importing import ImportOptions as ImportOptions
from .conversion.gguf.importing import import_gguf as import_gguf
from .conversion.onnx.export import OnnxResult as OnnxResult
from .conversion.onnx.export import export_onnx as export_onnx
from .conversion.onnx.model import OnnxModel as OnnxModel
from .conversion.onnx.options import OnnxOptions as OnnxOptions
from .conversion.onnx.worker import OnnxTimes as OnnxTimes
from .conversion.onnx.worker import OnnxWorker as OnnxWorker
from .data.answers import learned_rows as learned_rows
from .data.calibration import Calibration as Calibration
from .data.calibration import calibrate as calibrate
from .data.chats import Chat as Chat
from .data.chats import NotAChatError as NotAChatError
from .data.chats import parse_chat as parse_chat
from .data.sources import Documents as Documents
from .data.sources import read_documents as read_documents
from .data.sources import refuse_texts as refuse_texts
from .data.template import NotRenderedError as NotRenderedError
from .data.template import render_chat as render_chat
from .drift.monitor import DriftAlarm as DriftAlarm
from .drift.monitor import DriftMonitor as DriftMonitor
from .drift.monitor import DriftReport as DriftReport
from .drift.monitor import DriftState as DriftState
from .drift.observation import DriftObservation as DriftObservation
from .drift.observation import observe_request as observe_request
from .drift.observation import tokenizer_fingerprint as tokenizer_fingerprint
from .drift.profile import DriftProfile as DriftProfile
from .drift.profile import load_drift_profile as load_drift_profile
from .drift.profile import make_drift_profile as make_drift_profile
from .drift.refusals import is_refusal as is_refusal
from .errors import (
    ArchitectureError as ArchitectureError,
)
from .errors import (
    CheckpointError as CheckpointError,
)
from .errors import (
    DiskError as DiskError,
)
from .errors import (
    FormatError as FormatError,
)
from .errors import (
    LayoutError as LayoutError,
)
from .errors import (
    LlmquantError as LlmquantError,
)
from .errors import (
    ParallelError as ParallelError,
)
from .errors import (
    ProofError as ProofError,
)
from .errors import (
    QuantizationError as QuantizationError,
)
from .errors import (
    RecipeError as RecipeError,
)
from .errors import (
    SourceError as SourceError,
)
from .errors import (
    SpecError as SpecError,
)
from .errors import (
    UnfitModelError as UnfitModelError,
)
from .errors import (
    UsageError as UsageError,
)
from .kernels import rounds_inputs as rounds_inputs
from .kernels.packed_linear import describe as describe
from .models.decoding.generation import end_tokens as end_tokens
from .models.decoding.generation import generate_tokens as generate_tokens
from .models.decoding.generation import plain_generation as plain_generation
from .models.decoding.long_rope import longrope_switch as longrope_switch
from .models.from_folder import (
    context_length as context_length,
)
from .models.from_folder import (
    load_tokenizer as load_tokenizer,
)
from .models.from_folder import (
    read_config as read_config,
)
from .models.from_folder import (
    read_generation_config as read_generation_config,
)
from .models.load import compute_dtype as compute_dtype
from .models.load import load as load
from .models.transformers import (
    register_with_transformers as register_with_transformers,
)
from .models.transformers import (
    unregister_from_transformers as unregister_from_transformers,
)
from .planning.allocation.allocate import Allocation as Allocation
from .planning.allocation.allocate import allocate as allocate
from .planning.allocation.options import AllocateOptions as AllocateOptions
from .planning.defaults import DefaultRecipe as DefaultRecipe
from .planning.defaults import choose_recipe as choose_recipe
from .planning.forecast import loaded_bytes as loaded_bytes
from .planning.forecast import running_bytes as running_bytes
from .planning.preview import Plan as Plan
from .planning.preview import make_plan as make_plan
from .quantization.options import Events as Events
from .quantization.options import QuantizeOptions as QuantizeOptions
from .quantization.options import QuantizeResult as QuantizeResult
from .quantization.plan import Progress as Progress
from .quantization.rerun import Comparison as Comparison
from .recipe import Recipe as Recipe
from .recipe import load_recipe as load_recipe
from .recipe import shipped_recipes as shipped_recipes
from .recipe_sections import QAT as QAT
from .records import ModuleReport as ModuleReport
from .records import QatRecord as QatRecord
from .runtime.computing import Computing as Computing
from .runtime.devices import (
    ChosenDtype as ChosenDtype,
)
from .runtime.devices import (
    parse_device as parse_device,
)
from .runtime.devices import (
    parse_dtype as parse_dtype,
)
from .runtime.host import user_cache as user_cache
from .runtime.memory import (
    peak_resident_bytes as peak_resident_bytes,
)
from .runtime.memory import (
    resident_bytes as resident_bytes,
)
from .runtime.processor import Processor as Processor
from .runtime.processor import this_processor as this_processor
from .runtime.threads import set_threads as set_threads
from .runtime.yaml_files import read_yaml as read_yaml
from .spec import QuantSpec as QuantSpec
from .training.options import QatEvents as QatEvents
from .training.options import QatOptions as QatOptions
from .training.options import QatResult as QatResult
from .training.options import TrainingStep as TrainingStep
from .training.run import qat as qat
from .training.stage import quantize as quantize
from .training.stage import rerun as rerun
from .weight import QuantizedWeight as QuantizedWeight
from .written import FileKind as FileKind
from .written import refuse_foreign as refuse_foreign
from .written import replace_file as replace_file
from .written import save_figure as save_figure
from .written import write_file as write_file

__version__: str
