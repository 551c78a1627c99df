"""``heliostat serve``: a family behind an HTTP port, for any OpenAI client."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from heliostat import __version__
from heliostat.cli.answering import CacheMib, Device, Dtype
from heliostat.cli.printing import note

Fam = Annotated[
    Path | None,
    typer.Argument(
        metavar="[FAM]", help="Folder of the family; may be left out where the cluster file names it."
    ),
]
Host = Annotated[str, typer.Option(help="Address to bind; others than loopback want --keys.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")]
Member = Annotated[
    list[str] | None, typer.Option(help="Who is served, once or several times; default: all and the base.")
]
KeyFile = Annotated[
    Path | None, typer.Option(show_default=False, help="YAML or JSON file of API keys: who may ask whom.")
]
AllowHost = Annotated[
    list[str] | None, typer.Option(help="A name under which the server may be reached; may be repeated.")
]
Pem = Annotated[
    Path | None, typer.Option(show_default=False, help="PEM file; with the other one the server speaks TLS.")
]
Readers = Annotated[
    int | None, typer.Option(show_default=False, help="So many processes that read prompts; with the next.")
]
Speakers = Annotated[
    int | None, typer.Option(show_default=False, help="So many processes that speak; neither: one does all.")
]
Engine = Annotated[
    str, typer.Option(help="embedded, or vllm: its servers as worker processes (python of HELIOSTAT_VLLM).")
]
ClusterFile = Annotated[
    Path | None,
    typer.Option(show_default=False, help="YAML file that says which worker hosts which modules."),
]
PrintCluster = Annotated[
    bool, typer.Option("--print-cluster", help="Print the cluster file that this would be, and end.")
]
MaxLength = Annotated[
    int | None, typer.Option(min=2, show_default=False, help="Most tokens of prompt and answer.")
]
MaxRunning = Annotated[int, typer.Option(min=1, help="Most requests in a batch.")]
MaxWaiting = Annotated[int, typer.Option(min=0, help="Most requests in the queue; more get 429.")]
Deadline = Annotated[
    float | None, typer.Option(min=0.001, show_default=False, help="Most seconds for a request.")
]
Patience = Annotated[
    float, typer.Option(min=0, help="Most seconds to wait for a worker where none is there for a request.")
]
Drain = Annotated[float, typer.Option(min=0, help="Most seconds to finish after SIGTERM.")]
MaxBody = Annotated[int, typer.Option(min=1, help="Largest body of a request, in MiB.")]
MaxConnections = Annotated[
    int, typer.Option(min=1, help="Most open connections; more get 503, but for /health.")
]


def serve(
    family: Fam = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    member: Member = None,
    keys: KeyFile = None,
    allow_host: AllowHost = None,
    tls_cert: Pem = None,
    tls_key: Pem = None,
    prefill_workers: Readers = None,
    decode_workers: Speakers = None,
    engine: Engine = "embedded",
    cluster: ClusterFile = None,
    print_cluster: PrintCluster = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    cache_mib: CacheMib = 1024,
    max_length: MaxLength = None,
    max_running: MaxRunning = 64,
    max_waiting: MaxWaiting = 256,
    deadline: Deadline = None,
    patience: Patience = 60.0,
    drain: Drain = 30.0,
    max_body_mib: MaxBody = 8,
    max_connections: MaxConnections = 512,
) -> None:
    """Each member is a model name. SIGTERM or Ctrl-C finishes what is in flight, a second one ends at once.

    With --prefill-workers and --decode-workers, or a --cluster file, worker processes answer instead of this one."""
    from heliostat.serve import run

    settings = run.Settings(
        family=family,
        cluster=cluster,
        prefill_workers=prefill_workers,
        decode_workers=decode_workers,
        engine=engine,
        host=host,
        port=port,
        members=member or None,
        keys=keys,
        allow_hosts=tuple(allow_host or ()),
        tls_cert=tls_cert,
        tls_key=tls_key,
        dtype=dtype,
        device=device,
        cache_mib=cache_mib,
        max_length=max_length,
        max_running=max_running,
        max_waiting=max_waiting,
        deadline=deadline,
        patience=patience,
        drain=drain,
        max_body_mib=max_body_mib,
        max_connections=max_connections,
    )
    if print_cluster:
        return print(run.cluster_text(settings), end="")
    note(f"loading {family or cluster} ...")
    run.serve(settings, version=__version__)
