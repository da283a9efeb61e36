"""``scaling4d train``: flags in, a run out.

Responsible for: the command's flags, the names gin files may use, and building the run they describe. Not responsible
for: gin's rules (``config/``) or the run itself (``train.py``).
"""

import shlex
import sys
from typing import Any

HELP = """usage: scaling4d train --gin_file=FILE [--gin_file=FILE …] [--model_dir=DIR] [--gin.NAME=VALUE …]

Pretrains a model. The same command started again resumes from the newest checkpoint in the run folder.

  --gin_file=FILE           a shipped recipe (pretrain/tiny.gin) or a path; later files win over earlier ones
  --gin.NAME=VALUE          sets a macro (--gin.TRAIN_STEPS=100) or a parameter (--gin.AdamW.learning_rate=1e-3)
  --gin_search_paths=A,B    more folders to look for gin files in
  --model_dir=DIR           the run folder, in place of the macro MODEL_DIR
  --dry_run                 print mesh, parameters, batch, steps, what would be restored, disk and memory; train nothing
  --show_batch              write the first augmented batch, visible patches outlined, as mp4; train nothing
  --allow_config_changes    resume although the configuration changed in a way that changes what is learned
  --lease_stale_s=60        seconds without a heartbeat after which another trainer's claim on the run folder is void

Several processes: under SLURM (srun), Open MPI 4, GKE and on Cloud TPU they find each other; elsewhere give each
  --coordinator_address=HOST:PORT --num_processes=N --process_id=I    (the host of process 0, a free port there)
  --expected_devices=N      devices of all processes together; the start ends where there are others
  --heartbeat_s=100         seconds after which a silent process counts as dead; the others then end with 127 or more
  --start_s=1800            seconds that a process waits for the others at the start; it then ends with 142

Shipped recipes: {recipes}

Exit codes: 0 done; 42 saved on request, run the same command again; 1 an error; 130 ended by a second Ctrl-C.
"""


def main(argv: list[str]) -> int:
    """Runs ``scaling4d train``; returns its exit code."""
    if not argv or "-h" in argv or "--help" in argv:
        print(HELP.format(recipes=", ".join(_recipes())))
        return 0
    from scaling4d import cluster, config, configurables, exits
    from scaling4d.errors import UserError

    gin_files, bindings, search_paths, rest = config.parse_flags(argv)
    switches = {"dry_run": False, "show_batch": False, "allow_config_changes": False}
    lease_stale_s = 60.0
    processes: dict[str, Any] = {}
    for flag in rest:
        name, equals, value = flag.removeprefix("--").partition("=")
        if name == "model_dir" and equals:
            bindings.append(f"train.model_dir={value!r}")
        elif name == "lease_stale_s" and equals:
            lease_stale_s = _number(flag, value, float)
        elif name == "coordinator_address" and equals:
            processes[name] = value
        elif name in ("num_processes", "process_id", "expected_devices", "heartbeat_s", "start_s") and equals:
            processes[name] = _number(flag, value, int)
        elif flag.startswith("--") and not equals and name in switches:
            switches[name] = True
        else:
            raise UserError(f"unknown flag '{flag}'; see scaling4d train --help")
    # The processes find each other before anything can touch JAX's devices: a gin import may.
    with cluster.start(cluster.ClusterConfig(**processes)) as joined:
        with joined.together():
            configurables.register()
            config.parse(gin_files, bindings, search_paths, roots=["train"])
            run = configurables.build_run()
        if switches["dry_run"]:
            from scaling4d import dry_run

            dry_run.report(run)
            return exits.DONE
        if switches["show_batch"]:
            from scaling4d import dry_run

            dry_run.show_batch(run)
            return exits.DONE
        from scaling4d.train import Start

        program = [sys.executable, "-m", "scaling4d.main"] if sys.argv[0].endswith(".py") else [sys.argv[0]]
        command = shlex.join([*program, "train", *argv])
        start = Start(config.resolved_config(), command, switches["allow_config_changes"], lease_stale_s)
        return run.start(start, joined)


def _number(flag: str, value: str, kind: type) -> Any:
    from scaling4d.errors import UserError

    try:
        return kind(value)
    except ValueError:
        raise UserError(f"'{flag}' is not {'a whole number' if kind is int else 'a number of seconds'}") from None


def _recipes() -> list[str]:
    import importlib.resources

    folder = importlib.resources.files("scaling4d.gin_configs") / "pretrain"
    return sorted(f"pretrain/{file.name}" for file in folder.iterdir() if file.name.endswith(".gin"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
