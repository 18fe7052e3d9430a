"""What a job would be and do, told before it does it: `--dry-run` of the commands that start work.

Whatever a run refuses before its first actor starts is refused here, in the same words. Nothing is written and no Ray
is started; the cluster is not asked.
"""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.checkpoints import Checkpoint
from cluster.commands.memory import Roles, print_estimate, roles
from cluster.config import EvaluateConfig, SftConfig, TrainConfig, config_text
from cluster.data_config import PhantomConfig, RowFilter
from cluster.fetching import uris
from cluster.lease import refuse_held
from cluster.lengths import RowLimit, fitting
from cluster.loop import checkpoint_to_resume, refuse_other_rows
from cluster.placement import Bundle, Node, bundles, core, joined, shortage
from cluster.run_folder import RunFolder, begins_anew, refuse_rays_cache
from cluster.trackers import interpreter, refuse_missing
from umrg.config import Config
from umrg.mistake import Mistake

JobConfig = TrainConfig | SftConfig | EvaluateConfig

GPU_GIB = 79.1
"""Memory that the estimate assumes of each GPU: what CUDA reports of a card of 80 GB."""


def dry_run(config: JobConfig, console: Console, *, elsewhere: bool = False) -> None:
    """Print the resolved configuration, what would be read and written, the actors with their placement, and what each
    role needs of its GPU. Raises ValueError or OSError for what the run would refuse.

    elsewhere: the run would be on another cluster, so neither its folder nor its files are looked at here. Where some
    files are named by URI, of which the run would make copies, none of them are, but its folder is.
    """
    print_config(config, console)
    remote = uris(config)
    if remote:
        _say(console, "not read", *(f"{key}: {uri}, which the run copies first" for key, uri in remote.items()))
    if not elsewhere:
        refuse_unstartable(config, console, files=not remote)
    wanted = listed(config)
    print_actors(wanted, console)
    _say(console, "placement", *placement(config, wanted, [] if elsewhere else own_nodes()))
    if not (elsewhere or remote) or (config.model is not None and config.model.is_dir()):
        print_memory(roles(config), console)
    _say(console, "dry run", "nothing was started or written")


def refuse_unstartable(config: JobConfig, console: Console, *, files: bool) -> None:
    """Print what would become of the run's folder, and the rows, in the order in which the run looks at them. files:
    whether those of data, model and expert are looked at. Raises ValueError or OSError for what the run would refuse
    before it starts an actor."""
    folder, checkpoint = run_folder(config)
    _say(console, "run folder", folder)
    if not isinstance(config, EvaluateConfig):
        refuse_missing(interpreter(config), config.trackers)
    if not files:
        return
    lines, rows = rows_read(config)
    _say(console, "data", *lines)
    if rows is not None:
        refuse_other_rows(checkpoint, RunFolder(config.runs / config.name), rows)
    refuse_unloadable(config)


def print_config(config: Config, console: Console) -> None:
    """The resolved configuration, as YAML."""
    console.print(config_text(config), end="", highlight=False, markup=False, soft_wrap=True)


def print_actors(wanted: Sequence[Bundle], console: Console) -> None:
    """One row a role: its actors are alike."""
    table = Table("role", "actors", "CPUs each", "GPUs each", "node labels", title="actors", title_justify="left")
    for role in dict.fromkeys(bundle.role for bundle in wanted):
        alike = [bundle for bundle in wanted if bundle.role == role]
        labels = ", ".join(f"{name}={value}" for name, value in alike[0].labels.items())
        table.add_row(role, str(len(alike)), f"{alike[0].cpus:g}", f"{alike[0].gpus:g}", labels or "any")
    console.print(table)


def print_memory(found: Roles, console: Console) -> None:
    """The estimate for GPUs of `GPU_GIB`, where any are asked for."""
    if any(bundle.gpus for role in found for bundle in role.bundles):
        print_estimate(found, GPU_GIB, console)
        _say(console, "", f"for GPUs of another size: medreasoner memory CONFIG --gpu GIB (here {GPU_GIB:g})")


def listed(config: JobConfig) -> list[Bundle]:
    """The resources of all actors of a job."""
    ranks = bundles("learner", config.learner.ranks, config.learner) if not isinstance(config, EvaluateConfig) else []
    if isinstance(config, SftConfig):
        return ranks
    return [
        *ranks,
        *bundles("rollout", config.rollout.actors, config.rollout),
        *bundles("segmenter", config.segmenter.actors, config.segmenter),
    ]


def placement(config: JobConfig, wanted: Sequence[Bundle], nodes: Sequence[Node]) -> list[str]:
    """How the actors would be placed, a line each. nodes: of a local cluster; empty for any other, which is not asked.
    Raises ValueError where a local cluster is too small."""
    colocated = config.colocated
    if nodes and (missing := shortage(joined(wanted, colocated=colocated), nodes)):
        raise Mistake(f"{missing}; ask for fewer actors or less of each")
    spread = config.spread
    asked = None if isinstance(config, EvaluateConfig) else config.learner.nodes
    slots = core(wanted, nodes, asked=asked, spread=spread, colocated=colocated)
    placed = [name for slot in slots for name in slot.names]
    lines = [
        f"on a cluster that is started on this machine, of {nodes[0].cpus:g} CPUs and {nodes[0].gpus:g} GPUs"
        if nodes
        else "on a running cluster, which was not asked"
    ]
    together = "; ".join(" + ".join(slot.names) for slot in slots)
    lines.append(f"before it begins, {'spread' if spread else 'packed'}: {together}")
    if later := [bundle.name for bundle in wanted if bundle.name not in placed]:
        lines.append(f"then, or as soon as there is room: {', '.join(later)}")
    return lines


def own_nodes() -> list[Node]:
    """This machine, where the run would start a cluster of its own on it; empty where RAY_ADDRESS names one, or one
    that was started here is running."""
    from ray._private.accelerators import get_accelerator_manager_for_resource
    from ray._private.services import canonicalize_bootstrap_address
    from ray._private.utils import get_num_cpus

    elsewhere = os.environ.get("RAY_ADDRESS") not in (None, "", "local")
    if elsewhere or canonicalize_bootstrap_address(None) is not None:
        return []

    gpus = get_accelerator_manager_for_resource("GPU")
    return [Node(cpus=get_num_cpus(), gpus=gpus.get_current_node_num_accelerators() if gpus else 0)]


def run_folder(config: JobConfig) -> tuple[str, Checkpoint | None]:
    """What would become of the run's folder, and the checkpoint from which the run would go on. Raises ValueError where
    the run would refuse it, and OSError where it could not write there."""
    path = config.runs / config.name
    refuse_rays_cache(path)
    _refuse_unwritable(path)
    refuse_held(path)
    resume = isinstance(config, EvaluateConfig) or config.resume != "never"
    anew = begins_anew(path, config, resume=resume)
    if isinstance(config, EvaluateConfig):
        from cluster.evaluate import refuse_finished

        refuse_finished(RunFolder(path))
        return f"{path}, made anew" if anew else f"{path}, continued", None
    checkpoint = checkpoint_to_resume(config, RunFolder(path))
    if checkpoint is None:
        return f"{path}, {'made anew' if anew else 'taken over'}; from the first step", None
    return f"{path}, {'made anew' if anew else 'taken over'}; goes on after step {checkpoint.state.step}", checkpoint


def refuse_unloadable(config: JobConfig) -> None:
    """Raise ValueError where an actor could not load its model or expert, as far as the run finds that out before."""
    if isinstance(config, TrainConfig):
        from cluster.train import actors as of_training

        of_training(config)
    elif isinstance(config, SftConfig):
        from cluster.sft import actors as of_tuning

        of_tuning(config, config.runs / config.name)
    else:
        from cluster.evaluate import actors as of_evaluation

        of_evaluation(config)


def _refuse_unwritable(path: Path) -> None:
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "", str(path))
    if not os.access(there, os.W_OK):
        raise PermissionError(errno.EACCES, "", str(path))


def rows_read(config: JobConfig) -> tuple[list[str], int | None]:
    """The rows that would be read or drawn, and their prompts' lengths, a line each; and how many there are to learn
    from, None where they would be drawn or the job learns nothing. Raises ValueError as the run."""
    data = config.data
    if isinstance(config, SftConfig):
        from cluster.sft import Images

        images = Images(config)
        held_out = f"; {len(images.learnt)} images, and {len(images.held_out)} held out"
        return [f"train: {images.lengths}, of {_files(config.data.train)}{held_out}"], images.lengths.rows
    if isinstance(config, EvaluateConfig):
        return [_rows("rows", config.data.eval, config, data, config.limit)[0]], None
    evaluated = RowFilter(overlong=data.overlong)
    train, count = _rows("train", config.data.train, config, data, None)
    return [train, _rows("held out", config.data.eval, config, evaluated, config.evaluation.limit)[0]], count


def _rows(
    name: str,
    source: Sequence[Path] | PhantomConfig,
    config: TrainConfig | EvaluateConfig,
    kept: RowFilter,
    most: int | None,
) -> tuple[str, int | None]:
    from cluster.data import first_rows, opened, prompt_limit

    limit: RowLimit | None = None
    if config.model is not None:
        limit = prompt_limit(config.model, config.spec(), config.rollout)
    if isinstance(source, PhantomConfig):
        return f"{name}: {source.phantoms:,} phantoms of seed {source.seed}, drawn into the run folder", None
    rows = first_rows(opened(source, kept), most)
    if limit is None:
        return f"{name}: {len(rows):,} rows of {_files(source)}", len(rows)
    lengths = fitting(rows, limit, kept.overlong)[1]
    return f"{name}: {lengths}, of {_files(source)}", lengths.rows


def _files(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def _say(console: Console, what: str, *lines: str) -> None:
    for i, line in enumerate(lines):
        console.print(f"{'' if i else what:<11}{line}", highlight=False, markup=False, soft_wrap=True)
