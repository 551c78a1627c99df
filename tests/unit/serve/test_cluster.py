"""Clusters: read from files, laid out from rows, refused where they cannot play a member; one for Docs, too."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from heliostat.build import read_family
from heliostat.errors import Refused
from heliostat.family import Row
from heliostat.serve.cluster import Cluster, Place, Terms, laid_out, read

ROOT = Path(__file__).parents[3]
ROWS = {
    "base": Row("base", "base", "base", "base"),
    "solo": Row("solo", "solo", "solo", "solo"),
    "math": Row("math", "base", "base", "math"),
    "code": Row("base", "code", "code", "code"),
    "plan": Row("base", "base", "plan", "plan"),
}


def written(folder: Path, content: Any) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def modules(cluster: Cluster) -> dict[str, set[str]]:
    return {place.name: set(place.modules or ()) for place in cluster.places}


def test_modules_go_where_rows_need_them() -> None:
    found = modules(laid_out(prefill=2, decode=1).filled(ROWS))
    reads = {"base", "solo", "math"}
    assert found == {"prefill-0": reads, "prefill-1": reads, "decode-0": {"base", "solo", "code", "plan"}}


def test_both_numbers_are_needed() -> None:
    for prefill, decode in ((0, 1), (1, 0)):
        with pytest.raises(Refused, match="give both"):
            laid_out(prefill=prefill, decode=decode)


def test_what_is_printed_is_read_back(tmp_path: Path) -> None:
    made = laid_out(prefill=2, decode=2, family="fam").filled(ROWS)
    assert read(written(tmp_path, made.to_yaml())) == made


def test_a_file_may_leave_out_all_but_the_roles(tmp_path: Path) -> None:
    workers = [{"spawn": "embedded", "roles": [role]} for role in ("prefill", "decode", "decode")]
    cluster = read(written(tmp_path, {"workers": [*workers, {"spawn": "embedded"}]}))
    assert [place.name for place in cluster.places] == ["prefill-0", "decode-0", "decode-1", "worker-0"]
    assert cluster.places[3] == Place(name="worker-0")
    assert modules(cluster.filled(ROWS))["worker-0"] == {"base", "solo", "math", "code", "plan"}


def test_a_module_that_the_file_places_goes_there_alone() -> None:
    places = (
        Place(name="a", roles=("prefill",), modules=("math",)),
        Place(name="b", roles=("prefill",)),
        Place(name="c", roles=("decode",)),
    )
    cluster = Cluster(places)
    assert cluster.hosts(ROWS["math"]) == {"a": ("math",), "c": ("base",)}
    assert cluster.hosts(ROWS["code"]) == {"b": ("base",), "c": ("code",)}
    assert modules(cluster.filled(ROWS)) == {
        "a": {"math"},
        "b": {"base", "solo"},
        "c": {"base", "solo", "code", "plan"},
    }


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("workers: [", "is not YAML"),
        ("- 1", "is no cluster file"),
        ({"worker": []}, "no key 'worker' (did you mean 'workers'?)"),
        ({"workers": "two"}, "workers is 'two'; it must be a list"),
        ({"workers": []}, "a cluster needs workers"),
        ({"workers": [3]}, "workers[0] is 3"),
        (
            {"workers": [{"spawn": "embedded", "role": []}]},
            "workers[0]: no key 'role' (did you mean 'roles'?)",
        ),
        (
            {"workers": [{"spawn": "embedded", "roles": ["decoder"]}]},
            "no role 'decoder' (did you mean 'decode'?)",
        ),
        ({"workers": [{"spawn": "embedded", "roles": []}]}, "roles is empty"),
        ({"workers": [{"spawn": "embedded", "roles": "decode"}]}, "must be a list of names"),
        ({"workers": [{"roles": ["decode"]}]}, "one of them"),
        ({"workers": [{"spawn": "embedded", "url": "http://x"}]}, "one of them"),
        ({"workers": [{"spawn": 3}]}, "spawn is 3"),
        ({"workers": [{"spawn": "embedded", "threads": 0}]}, "threads is 0"),
        ({"workers": [{"spawn": "embedded", "memory": "4G"}]}, "memory (MiB) is '4G'"),
        ({"workers": [{"spawn": "embedded", "name": "../x"}]}, "'../x' is no name"),
        ({"workers": [{"spawn": "embedded", "name": "a"}] * 2}, "two workers are called 'a'"),
        ({"family": 3, "workers": [{"spawn": "embedded"}]}, "family is 3"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(tmp_path: Path, content: Any, told: str) -> None:
    with pytest.raises(Refused) as refused:
        read(written(tmp_path, content))
    assert told in str(refused.value)


def test_engines_that_this_version_cannot_reach_are_refused_by_worker() -> None:
    Cluster((Place(name="a"),)).refuse_unreachable()
    for place, told in (
        (Place(name="far", spawn=None, url="10.0.0.1:8000"), "url is '10.0.0.1:8000'"),
        (Place(name="x", spawn="embeded"), "did you mean 'embedded'"),
        (Place(name="x", tensor_parallel=2), "tensor_parallel is for vllm"),
    ):
        with pytest.raises(Refused, match=told):
            Cluster((place,)).refuse_unreachable()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://127.0.0.1:80001", "out of range"),
        ("http://127.0.0.1:0", "ports are 1 to 65535"),
        ("http://[::1", "Invalid IPv6"),
        ("http://", "it must be like"),
        ("http://a b:1", "it must be like"),
        ("http://user:word@10.0.0.1:1", "it must be like"),
        ("ftp://10.0.0.1:1", "it must be like"),
    ],
)
def test_an_address_that_is_none_is_refused_before_anybody_is_asked(url: str, told: str) -> None:
    with pytest.raises(Refused, match=told):
        Cluster((Place(name="far", spawn=None, url=url),)).refuse_unreachable()


def test_addresses_of_every_kind_are_taken_and_a_port_beside_needs_room() -> None:
    urls = (
        "http://10.0.0.1:65000",
        "https://node-1.example:8001/vllm",
        "http://[fe80::1]:65535",
        "http://my_node",
    )
    places = tuple(Place(name=f"w{n}", spawn=None, url=url) for n, url in enumerate(urls))
    Cluster(places).refuse_unreachable()
    with pytest.raises(Refused, match="ports are 1 to 64535"):
        Cluster(places, terms=Terms(transfer="nixl")).refuse_unreachable()


@pytest.mark.parametrize(
    ("places", "told"),
    [
        ([("p", "prefill", ["base"]), ("d", "decode", ["base"])], "'math.*no worker with role prefill hosts 'math.own'"),
        ([("p", "prefill", ["base", "math.own"]), ("d", "decode", ["math.own"])], "role decode hosts 'base'"),
        ([("p", "prefill", ["base"])], "no worker with role decode"),
        ([("p", "prefill", ["base", "mth"]), ("d", "decode", ["base"])], "no module 'mth'"),
    ],
)  # fmt: skip
def test_a_member_that_nobody_can_play_is_refused_by_name(
    tiny_family_made: Path, places: list[tuple[str, Any, list[str]]], told: str
) -> None:
    family = read_family(tiny_family_made)
    cluster = Cluster(tuple(Place(name=n, roles=(r,), modules=tuple(m)) for n, r, m in places))
    with pytest.raises(Refused, match=told):
        cluster.refuse_unplayable(family, {"math": family.row("math")})


def test_both_halves_of_an_answer_must_be_on_one_worker(tiny_family_made: Path) -> None:
    family = read_family(tiny_family_made)
    own = family.row("plan").speaker
    apart = (
        Place(name="p", roles=("prefill",), modules=("base",)),
        Place(name="d", roles=("decode",), modules=("base",)),
        Place(name="e", roles=("decode",), modules=(own,)),
    )
    rows = {"plan": family.row("plan")}
    with pytest.raises(Refused, match="both of"):
        Cluster(apart).refuse_unplayable(family, rows)
    laid_out(prefill=1, decode=1).filled(rows).refuse_unplayable(family, rows)


def test_the_example_of_the_docs_is_a_cluster(tmp_path: Path, tiny_family_made: Path) -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (example,) = [block for block in text.split("```yaml\n") if block.startswith("# cluster.yaml")]
    cluster = read(written(tmp_path, example.partition("```")[0]))
    assert cluster.family == "fam" and {place.roles for place in cluster.places} == {
        ("prefill",),
        ("decode",),
    }
    family = read_family(tiny_family_made)
    rows = {name: family.row(name) for name in family.members}
    filled = cluster.filled(rows)
    filled.refuse_unreachable()
    filled.refuse_unplayable(family, rows)


def test_one_cluster_has_one_kind_of_engine() -> None:
    places = (Place(name="a"), Place(name="b", spawn=None, url="http://10.0.0.1:8001"))
    with pytest.raises(Refused, match="'b' is of engine vllm, worker 'a' of embedded"):
        Cluster(places).refuse_unreachable()
    Cluster(places[1:]).refuse_unreachable()


def test_one_cluster_has_one_degree_of_parallelism() -> None:
    places = (Place(name="a", spawn="vllm"), Place(name="b", spawn="vllm", tensor_parallel=2))
    with pytest.raises(Refused, match="'b' has tensor_parallel 2, worker 'a' 1"):
        Cluster(places).refuse_unreachable()


def test_servers_terms_are_read_back(tmp_path: Path) -> None:
    content = {
        "vllm": {"page_size": 64, "dtype": "float32", "transfer": "nixl", "key_env": "KEY"},
        "workers": [
            {"url": "http://10.0.0.1:8001", "roles": ["prefill"], "tensor_parallel": 2, "modules": ["base"]}
        ],
    }
    cluster = read(written(tmp_path, content))
    assert cluster.terms == Terms(page_size=64, dtype="float32", transfer="nixl", key_env="KEY")
    assert cluster.engine == "vllm" and cluster.places[0].tensor_parallel == 2
    assert read(written(tmp_path, cluster.to_yaml())) == cluster


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"pages": 3}, "page_size"),
        ([], "must hold lines"),
        ({"page_size": 0}, "page_size is 0"),
        ({"dtype": 8}, "dtype is 8"),
    ],
)
def test_wrong_terms_are_refused(tmp_path: Path, terms: Any, words: str) -> None:
    with pytest.raises(Refused, match=words):
        read(written(tmp_path, {"vllm": terms, "workers": [{"spawn": "vllm"}]}))
