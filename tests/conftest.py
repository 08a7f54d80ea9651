# SPDX-License-Identifier: Apache-2.0
"""Two fake devices, no silent rank promotion, shapes and types checked: before jax is imported."""

import contextlib
import fnmatch
import gc
import os
import pathlib
import signal
import tomllib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=2"
    # Most of the suite's time is compiling, and half of that the newer emitters; what runs is tiny.
    # Splitting a program between threads costs a quarter more in all.
    + " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    + " --xla_cpu_parallel_codegen_split_count=1"
)
# Where a shell starts the suite in the background, processes that it starts ignore Ctrl-C too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Tracing makes many objects that live for long; looking through them all was a quarter of its time.
gc.set_threshold(100_000, 50, 1000)
# Fake devices meet in collectives on one pool of as many threads as the machine has cores. On two
# cores both threads waited, each device in another all-reduce of one program, until XLA ended the
# process after 40 s; with more threads the others arrive. XLA reads this where it makes its client.
os.environ["NPROC"] = "16"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jaxtyping

jaxtyping.install_import_hook(
    [
        "localglobal_jax.inference.decoding",
        "localglobal_jax.operators",
        "localglobal_jax.training.losses",
    ],
    "beartype.beartype",
)

import gcs_faults
import gcs_server
import jax
import pytest

import localglobal_jax  # noqa: F401, before cv2: sets its bound on an image's pixels

jax.config.update("jax_numpy_rank_promotion", "raise")


MATRICES = pathlib.Path(__file__).parent / "matrices.toml"


def pytest_collection_modifyitems(config, items):
    """Marks as slow the cases that `MATRICES` does not name, of the tests that it names.

    Raises UsageError if all tests are collected, and no case fits one of its patterns.
    """
    matrices = tomllib.loads(MATRICES.read_text(encoding="utf-8"))
    unseen = {
        (file, test, pattern)
        for file, tests in matrices.items()
        for test, patterns in tests.items()
        for pattern in patterns
    }
    for item in items:
        file, test = str(item.path.relative_to(MATRICES.parent)), getattr(item, "originalname", "")
        if patterns := matrices.get(file, {}).get(test):
            fitting = [p for p in patterns if fnmatch.fnmatchcase(item.callspec.id, p)]
            unseen -= {(file, test, pattern) for pattern in fitting}
            if not fitting:
                item.add_marker(pytest.mark.slow)
    if unseen and config.args == config.getini("testpaths"):
        raise pytest.UsageError(f"{MATRICES}: no case fits {sorted(unseen)}")


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_module():
    """What a module compiled goes with it: of all, a worker kept 6 GB, in pieces of which the
    system allows a process 65,530; 41,000 were taken."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """The embedded digits, prepared once."""
    from localglobal_jax.data.tfds.prepare import prepare

    directory = tmp_path_factory.mktemp("tfds")
    prepare("digits", str(directory))
    return str(directory)


@pytest.fixture(scope="session")
def gcs_proxy():
    """A server of Google Cloud Storage's API behind a proxy, one per process of the suite.

    tensorstore keeps the first URL that it is given, so every test passes through the proxy.
    """
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(gcs_server.serve())
        except (ImportError, RuntimeError) as error:
            if os.environ.get(gcs_server.REQUIRED) == "required":
                raise
            pytest.skip(f"fake-gcs-server does not run here: {error}")
        yield stack.enter_context(gcs_faults.serve(server))


@pytest.fixture(scope="session")
def gcs(gcs_proxy):
    """The URL of the server. `epath` keeps its first file system, which has to be ours."""
    from localglobal_jax.checkpoints import store

    store.prepare()
    return gcs_proxy.url


@pytest.fixture
def faults(gcs_proxy):
    """The proxy in front of the server, without rules before and after the test."""
    gcs_proxy.clear()
    yield gcs_proxy
    gcs_proxy.clear()


@pytest.fixture
def bucket(gcs):
    """A directory in an empty bucket."""
    return f"gs://{gcs_server.new_bucket(gcs)}/runs/one"
