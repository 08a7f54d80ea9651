# SPDX-License-Identifier: Apache-2.0
"""Old import paths and names, kept for one version with a DeprecationWarning.

Imports only the standard library. All paths are relative to the package. `install` registers the
finder that resolves `MODULES`. A package or module that kept its path but lost names resolves those
of `NAMES` with ``__getattr__ = renamed.attributes(__name__)``.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

PACKAGE = __name__.partition(".")[0]


def _table(text: str) -> dict[str, str]:
    return dict(line.split() for line in text.split("\n") if line)


MODULES = _table("""
accounting                   models.flops
arrays                       operators.grids
bench                        profiling.bench
bench_command                cli.bench
blocks.convnext              blocks.convolution
blocks.mbconv                blocks.convolution
blocks.muse                  blocks.transformer
blocks.outlooker             blocks.transformer
blocks.residual              blocks.layers
checkpoint                   checkpoints.manager
chips                        parallel.chips
class_attention              models.heads
classify                     inference.classifier
classify_command             cli.classify
config_values                config.values
configlib                    config.loading
conversion                   convert.files
convert.fairseq_file         convert.fairseq
convert.focal_buffers        convert.focal
convert.focal_names          convert.focal
convert.timm_coatnet         convert.timm.coatnet
convert.timm_coatnet_cfg     convert.timm.coatnet_config
convert.timm_volo            convert.timm.volo
convert_command              cli.convert
data.augment                 data.images.augment
data.buckets                 data.text.bucketing
data.builders                data.tfds.builders
data.builders.debian         data.tfds.builders.debian
data.builders.digits         data.tfds.builders.digits
data.builders.fashion_mnist  data.tfds.builders.fashion_mnist
data.builders.lohelp         data.tfds.builders.lohelp
data.descriptions            data.tfds.trust
data.folder                  data.images.folder
data.image_size              data.images.headers
data.mixing                  data.images.device_ops
data.pairs                   data.text.pairs
data.picture_files           data.images.files
data.prepare                 data.tfds.prepare
data.randaugment             data.images.randaugment
data.readers                 data.images.readers
data.records                 data.tfds.records
data.text_files              data.text.files
data.tfrecord                data.tfds.tfrecord
data.tokenizer               data.text.tokenizers
decoding                     inference.decoding
decoding.beam                inference.decoding.beam
decoding.hypotheses          inference.decoding.hypotheses
decoding.sampling            inference.decoding.sampling
digest                       checkpoints.digests
evaluate                     training.evaluation
event_file                   training.reporting.tensorboard
grad_cam                     inference.grad_cam
health                       training.divergence
heat_map                     inference.heat_map
hosts                        parallel.multihost
in_sequence                  blocks.stack
inspect_command              cli.inspect
launch.target                launch.backend
layout                       models.layout
losses                       training.losses
memory                       parallel.host_memory
metrics                      training.metrics
mix_token                    models.mix_token
model_card                   training.reporting.model_card
models.muse                  models.encoder_decoder
models.sequence              models.encoder_decoder
models_command               cli.models
operators.activation         operators.activations
operators.adaptive_sequence  operators.adaptive
operators.cross_attention    operators.attention
operators.dynamic_sequence   operators.convolution
operators.focal_windows      operators.focal
operators.muse_sequence      operators.muse
operators.normalized         operators.kernels.batch_norm
operators.projection         operators.dense
operators.sequence           operators.cache
optim                        training.optim
orbax_mended                 checkpoints.orbax_patches
plan                         profiling
plan.collectives             profiling.collectives
plan.compile                 profiling.compile
plan.hlo                     profiling.hlo
plan.lints                   profiling.lints
plan.process                 profiling.compiler_process
plan.report                  profiling.roofline
plan.search                  profiling.search
plan.shapes                  profiling.abstract_task
plan.table                   profiling.table
plan.topologies              profiling.topologies
plan_command                 cli.plan
reach                        operators.reach
remote                       checkpoints.gcs
replay                       training.replay
report                       training.reporting.html
report.attempts              training.reporting.html.attempts
report.curves                training.reporting.html.curves
report.examples              training.reporting.html.predictions
report.facts                 training.reporting.html.facts
report.gather                training.reporting.html.gather
report.page                  training.reporting.html.page
report_command               cli.report
reporting                    training.reporting.metrics_log
run_report                   training.reporting.run
samples                      training.reporting.examples
schema                       config.schema
scoring                      inference.bleu
session                      training.setup
sharding                     parallel.sharding
stems_heads                  models.stems
step_context                 parallel.context
stored                       checkpoints.reader
stores                       checkpoints.workdir
sweep_command                cli.sweep
sweeps                       config.sweeps
tasks                        training.tasks
tasks.classification         training.tasks.classification
tasks.task                   training.tasks.task
tasks.translation            training.tasks.translation
train                        training.loop
train_command                cli.train
train_step                   training.step
translate                    inference.translator
translate_command            cli.translate
verification                 training.verification
wandb_run                    training.reporting.wandb
workdir                      checkpoints.workdir
""")

NAMES = _table("""
accounting.Account                         models.flops.ModelCost
accounting.account                         models.flops.model_cost
bench.Subject                              profiling.bench.BenchmarkedStep
blocks.AdaptiveTransformer                 blocks.transformer.AdaptiveConvBlock
blocks.ConvNeXt                            blocks.convolution.ConvNeXtBlock
blocks.EquivariantTransformer              blocks.transformer.EquivariantAttentionBlock
blocks.FocalTransformerBlock               blocks.transformer.FocalAttentionBlock
blocks.MBConv                              blocks.convolution.MBConvBlock
blocks.Outlooker                           blocks.transformer.OutlookerBlock
blocks.PlainTransformer                    blocks.transformer.AttentionBlock
blocks.Transformer                         blocks.transformer.RelativeAttentionBlock
blocks.convnext.ConvNeXt                   blocks.convolution.ConvNeXtBlock
blocks.mbconv.MBConv                       blocks.convolution.MBConvBlock
blocks.outlooker.Outlooker                 blocks.transformer.OutlookerBlock
blocks.transformer.AdaptiveTransformer     blocks.transformer.AdaptiveConvBlock
blocks.transformer.EquivariantTransformer  blocks.transformer.EquivariantAttentionBlock
blocks.transformer.FocalTransformerBlock   blocks.transformer.FocalAttentionBlock
blocks.transformer.PlainTransformer        blocks.transformer.AttentionBlock
blocks.transformer.Transformer             blocks.transformer.RelativeAttentionBlock
cli.console                                cli.main.console
config_values.fit                          config.values.coerce
configlib.check                            config.validation.check
configlib.check_fields                     config.validation.check_fields
configlib.compared                         config.loading.load_runs
configlib.difference                       config.values.difference
configlib.flatten                          config.values.flatten
configlib.run_class                        config.validation.run_class
configlib.to_tree                          config.values.to_tree
configlib.unknown                          config.validation.unknown
conversion.pretrained                      inference.load.pretrained
data.buckets.granules                      data.text.bucketing.round_up
data.folder.FolderReader                   data.images.folder_reader.FolderReader
data.folder.count                          data.images.folder_count.count
data.folder.left_out                       data.images.folder_notes.left_out
data.folder.notes                          data.images.folder_notes.of_folder
data.images.BLOCK                          data.images.pipeline.BLOCK
data.images.CHANGE                         data.images.pipeline.CHANGE
data.images.CROP                           data.images.pipeline.CROP
data.images.EVAL_FRACTION                  data.images.pipeline.EVAL_FRACTION
data.images.IN_MEMORY                      data.images.pipeline.IN_MEMORY
data.images.ImageSource                    data.images.pipeline.ImageSource
data.images.check_channels                 data.images.pipeline.check_channels
data.images.class_names                    data.images.pipeline.class_names
data.images.describe                       data.images.pipeline.describe
data.images.for_evaluation                 data.images.pipeline.for_evaluation
data.images.open_split                     data.images.pipeline.open_split
data.images.seen_in_evaluation             data.images.pipeline.seen_in_evaluation
data.records.Tolerance                     data.tfds.records.BadRecordBudget
data.text.BLOCK                            data.text.pipeline.BLOCK
data.text.Batch                            data.text.pipeline.Batch
data.text.Ragged                           data.text.pipeline.Ragged
data.text.TextSource                       data.text.pipeline.TextSource
data.text.check_budget                     data.text.pipeline.check_budget
data.text.eval_batches                     data.text.pipeline.eval_batches
data.text.open_eval                        data.text.pipeline.open_eval
data.text.open_train                       data.text.pipeline.open_train
data.text.train_batches                    data.text.pipeline.train_batches
evaluate.find_step                         inference.load.find_step
evaluate.load                              inference.load.load
evaluate.read_run                          inference.load.read_run
evaluate.read_variables                    inference.load.read_variables
health.Spikes                              training.divergence.LossSpikeDetector
health.Watch                               training.divergence.DivergenceMonitor
hosts.Cluster                              parallel.rendezvous.Cluster
hosts.HEARTBEAT                            parallel.watch.HEARTBEAT
hosts.Lost                                 parallel.multihost.HostLost
hosts.detect                               parallel.rendezvous.detect
hosts.gathered                             parallel.multihost.all_gather
hosts.roll_call                            parallel.rendezvous.rendezvous
hosts.start                                parallel.rendezvous.start
hosts.told                                 parallel.multihost.broadcast_text
in_sequence.in_sequence                    blocks.stack.apply_blocks
launch.target.of_tpu                       launch.tpu.target
memory.give_back                           parallel.host_memory.trim_heap
operators.adaptive.AdaptiveSequence        operators.adaptive.AdaptiveConv
operators.muse.Kind                        operators.convolution.Kind
operators.muse.SharedValueConv             operators.convolution.SharedValueConv
operators.muse.mix                         operators.convolution.mix
operators.sequence.Attend                  operators.attention.Attend
operators.sequence.DistanceBias            operators.attention.DistanceBias
operators.sequence.FEW                     operators.attention.FEW
operators.sequence.Memory                  operators.cache.CrossKV
operators.sequence.SelfAttention           operators.attention.SelfAttention
operators.sequence.slots                   operators.cache.to_cache_layout
operators.sequence.tail                    operators.cache.last_positions
operators.sequence.visible                 operators.cache.attention_mask
operators.sequence.visible_at              operators.cache.attention_mask_at
orbax_mended.mend                          checkpoints.orbax_patches.apply_patches
parallel.Placement                         parallel.placement.Partitioner
parallel.describe                          parallel.placement.describe
parallel.make_mesh                         parallel.placement.make_mesh
parallel.pretend                           parallel.placement.placeholder_devices
parallel.use_compilation_cache             parallel.placement.use_compilation_cache
remote.Copy                                checkpoints.gcs.LocalMirror
reporting.PANELS                           training.reporting.plots.PANELS
reporting.Progress                         training.reporting.progress.Progress
reporting.learning_curve                   training.reporting.plots.learning_curve
reporting.parameter_table                  training.reporting.progress.parameter_table
reporting.progress_line                    training.reporting.progress.progress_line
run_report.Output                          training.reporting.run.MetricLogger
run_report.Window                          training.throughput.ThroughputMeter
run_report.announce                        training.reporting.run.log_run_header
run_report.environment                     training.reporting.provenance.environment
run_report.versions                        training.reporting.provenance.versions
samples.Samples                            training.reporting.examples.ExampleLogger
session.Session                            training.setup.TrainSetup
session.open_session                       training.setup.prepare_setup
stems_heads.PoolingHead                    models.heads.PoolingHead
step_context.BlockForms                    parallel.context.StackOptions
step_context.block_forms                   parallel.context.stack_options
step_context.own_key                       parallel.context.device_key
stored.first_good                          checkpoints.reader.newest_valid
stored.together                            checkpoints.reader.all_hosts_agree
sweeps.elsewhere                           config.sweeps.cloud_name
tasks.classification.normalize             data.images.device_ops.normalize
tasks.task.Variables                       models.registry.Variables
tasks.task.check_labels                    checkpoints.workdir.check_labels
train.claim                                training.setup.reserve
workdir.claim                              checkpoints.workdir.reserve
""")

# These paths stay documented, and importing them does not warn.
CURRENT = ("decoding", "decoding.beam", "decoding.hypotheses", "decoding.sampling")
# The public functions that have the name of an old module: an alias of it can be called as well.
FUNCTIONS = ("evaluate", "train")


def install() -> None:
    """Makes `MODULES` importable. The finder comes first in ``sys.meta_path``.

    Behind the default finder, ``tasks.task`` would be found in the folder of ``training.tasks`` and
    executed a second time.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def attributes(module: str) -> Callable[[str], Any]:
    """Returns the ``__getattr__`` of `module` (a whole path).

    It resolves old names, which warn, and imports the submodules of ``__all__`` when first used.
    """
    here = module.removeprefix(f"{PACKAGE}.")
    old = {}
    for path, new in NAMES.items():
        parent, _, name = path.rpartition(".")
        if MODULES.get(parent, parent) == here:
            old[name] = (path, new)

    def resolve(name: str) -> Any:
        if name in vars(sys.modules[module]).get("__all__", ()):
            return importlib.import_module(f"{module}.{name}")
        if name not in old:
            raise AttributeError(f"module {module} has no attribute {name!r}")
        path, new = old[name]
        parent, _, current = new.rpartition(".")
        found = getattr(importlib.import_module(f"{PACKAGE}.{parent}"), current)
        _warn(path, new)
        return found

    return resolve


class _Finder:
    """Imports a module of `MODULES` as the module at its new path, the same object."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Returns the spec of an old path of this package, otherwise None."""
        package, _, old = name.partition(".")
        if package != PACKAGE or old not in MODULES:
            return None
        return importlib.util.spec_from_loader(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Returns None: the import system makes an empty module, which `exec_module` replaces."""

    def exec_module(self, module: types.ModuleType) -> None:
        """Puts the module at the new path into ``sys.modules`` under the old path."""
        old = module.__name__.partition(".")[2]
        new = importlib.import_module(f"{PACKAGE}.{MODULES[old]}")
        if not hasattr(new, "__getattr__"):
            new.__getattr__ = attributes(new.__name__)  # type: ignore[method-assign]
        if old not in CURRENT:
            _warn(old, MODULES[old])
        sys.modules[module.__name__] = _Callable(new, old) if old in FUNCTIONS else new


class _Callable(types.ModuleType):
    """An old module whose name is now that of a function, for instance ``train``.

    Importing it binds it to that name in the package, so that it has to be both.
    """

    def __init__(self, module: types.ModuleType, function: str):
        super().__init__(f"{PACKAGE}.{function}", module.__doc__)
        self._module = module
        self._function = getattr(module, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _warn(old: str, new: str) -> None:
    """Warns at the line that named `old`: the frames of the import system are skipped."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals["__name__"].partition(".")[0] in ("importlib", PACKAGE):
        frame = frame.f_back
    warnings.warn_explicit(
        f"{PACKAGE}.{old} is now {PACKAGE}.{new}; the old name goes with the next version",
        DeprecationWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        frame.f_globals["__name__"],
        frame.f_globals.setdefault("__warningregistry__", {}),
    )
