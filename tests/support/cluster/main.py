"""`make cluster` and `make cluster-down`: a cluster that stays until it is taken down.

    python tests/support/cluster/main.py build                       everything that is made once (ten minutes and more)
    python tests/support/cluster/main.py up [--nodes 2] [--kwok 4] [--gpus 8] [--no-jobset] [--no-kueue]
    python tests/support/cluster/main.py image operator              an image of images/, built and given to the nodes
    python tests/support/cluster/main.py status
    python tests/support/cluster/main.py down

Each checkout has one cluster of its own; several checkouts can have theirs at the same time.
"""

import argparse
import hashlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Started as a file, Python looks for modules in its folder, not in the one above, which holds the package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster import buildah, programs, real_nodes, state
from cluster.daemons import ClusterError
from cluster.local import Cluster, why_not
from go_build import ROOT, BuildError


def cluster_name() -> str:
    return f"dev-{hashlib.sha256(str(ROOT).encode()).hexdigest()[:6]}"


def build() -> None:
    """Programs and images beside each other: the compiler keeps all cores busy, an image waits for downloads and unpacks on one."""
    with ThreadPoolExecutor() as pool:
        for made in [pool.submit(programs.build_all, programs.ALL, _say), pool.submit(build_images)]:
            made.result()


def build_images() -> None:
    if (reason := why_not(nodes=2)) is None:
        real_nodes.prepare(_say)
        buildah.built(buildah.OPERATOR, _say)
    else:
        _say(f"nothing made for real nodes: {reason}")


def up(arguments: argparse.Namespace) -> None:
    record = state.find(cluster_name())
    if record is not None:
        cluster = Cluster(record)
        if any(cluster.processes().values()):
            _say("the cluster is up already; `make cluster-down` first for another")
            _explain(cluster)
            return
        state.remove(record)  # left from before the machine was started anew
    nodes = arguments.nodes
    if nodes is None:
        reason = why_not(nodes=2)
        nodes = 2 if reason is None else 0
        if reason is not None:
            _say(f"no real nodes: {reason}")
    programs.build_all(["helm"], _say)
    started = time.monotonic()
    cluster = Cluster.start(
        nodes=nodes,
        kwok=arguments.kwok,
        jobset=not arguments.no_jobset,
        kueue=not arguments.no_kueue,
        gpus_per_node=arguments.gpus,
        name=cluster_name(),
        detached=True,
        report=_say,
    )
    _say(f"up in {time.monotonic() - started:.0f} s")
    _explain(cluster)


def image(name: str) -> None:
    made = buildah.built(name, _say)
    print(
        f"\n  image    {made.name}\n  archive  {made.archive}   # docker load, podman load, skopeo copy docker-archive:…\n"
    )
    record = state.find(cluster_name())
    if record is not None and record.nodes:
        _say("giving it to the nodes of the cluster")
        Cluster(record, _say).import_image(made.archive)


def status() -> int:
    record = state.find(cluster_name())
    if record is None:
        print("There is no cluster. `make cluster` starts one.")
        return 1
    cluster = Cluster(record)
    for name, pid in cluster.processes().items():
        print(f"{name:24} {'stopped' if pid is None else f'running, process {pid}'}")
    _explain(cluster)
    return 0


def down() -> None:
    for name in state.remove_orphans():
        _say(f"removed {name}, whose process was killed")
    record = state.find(cluster_name())
    if record is None:
        _say("there is no cluster to take down")
        return
    state.remove(record)
    _say("down; nothing is left")


def _explain(cluster: Cluster) -> None:
    print(
        f"\n  export KUBECONFIG={cluster.kubeconfig}\n"
        f"  export PATH={programs.program('kubectl').parent}:$PATH   # kubectl and helm\n\n"
        f"Logs and the audit log are in {cluster.state}; `make cluster-down` takes everything away."
    )
    if cluster.inside:
        print(f"Pods and nodes are reached by their addresses from inside: {' '.join(cluster.inside)} COMMAND")


def _say(line: str) -> None:
    print(f"==> {line}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build")
    start = commands.add_parser("up")
    start.add_argument("--nodes", type=int, help="real nodes; without it two, or none where they cannot run")
    start.add_argument("--kwok", type=int, default=4, help="fake nodes")
    start.add_argument("--gpus", type=int, default=8, help="GPUs that each node claims to have")
    start.add_argument("--no-jobset", action="store_true")
    start.add_argument("--no-kueue", action="store_true")
    commands.add_parser("image").add_argument("name", choices=[buildah.OPERATOR, buildah.RUNTIME])
    commands.add_parser("status")
    commands.add_parser("down")
    arguments = parser.parse_args()
    try:
        if arguments.command == "build":
            build()
        elif arguments.command == "up":
            up(arguments)
        elif arguments.command == "image":
            image(arguments.name)
        elif arguments.command == "status":
            return status()
        else:
            down()
    except (ClusterError, BuildError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
