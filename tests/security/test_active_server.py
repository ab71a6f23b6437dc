"""An active server tries to get one hospital's update out of the secure aggregation: it tells hospitals different
things, sums a round twice, exchanges keys and invents hospitals. Hospitals that break the protocol are named.

The hospitals' own functions are asked, as their app asks them; what a server would send is made by hand.
"""

import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, RecordDict
from in_process import RealHospital

import federation.server.secure_round
from common import MedFLError
from federation.hospital.faults import HospitalError
from federation.hospital.identity import Identity
from federation.hospital.secure_stages import masked, secure_stage
from federation.hospital.sums import Sums
from federation.protocol.answers import Part
from federation.protocol.masks import binding, from_sum
from federation.protocol.messages import message, read
from federation.protocol.requests import Agree, Keys, Shares, Train, Unmask
from federation.protocol.secure_aggregation import Party, WrongShares, unmasked
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import array_record
from federation.server.mailbox import Answer
from federation.server.membership import Member
from federation.server.secure_round import SecureRound

LIMIT, LENGTH, MOST = 2.0, 500, 100
LABELS = ("anna", "bert", "cleo", "dave")
NODES = range(1, len(LABELS) + 1)
OPENSSH = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


class Consorts:
    """Four hospitals that take part, and a server that asks them what it likes."""

    def __init__(self, folder, kits: bool = False):
        self.folder, self.updates = folder, {label: 0.1 * torch.randn(LENGTH) for label in LABELS}
        keys = {label: ec.generate_private_key(ec.SECP384R1()) for label in LABELS} if kits else {}
        members = {label: key.public_key().public_bytes(*OPENSSH).decode() for label, key in keys.items()}
        self.identities = {label: self._identity(label, keys.get(label), members or None) for label in LABELS}
        self.starts = itertools.count()
        for label in LABELS:
            self.start(label)

    def _identity(self, label, key, members) -> Identity:
        path = self.folder / f"{label}.key"
        if key:
            form = (
                serialization.Encoding.PEM,
                serialization.PrivateFormat.OpenSSH,
                serialization.NoEncryption(),
            )
            path.write_bytes(key.private_bytes(*form))
        return Identity(
            label=label,
            cid=None,
            data=self.folder,
            device="cpu",
            medfl="1",
            models=self.folder / "models",
            code="",
            key=path if key else None,
            members=members,
        )

    def start(self, label: str, run: str = "run") -> None:
        """Start a hospital, perhaps again, and have it join a run."""
        home = self.folder / f"{label}-{next(self.starts)}"
        home.mkdir()
        self.__dict__.setdefault("sums", {})[label] = Sums(self.identities[label], home)
        self.__dict__.setdefault("contexts", {})[label] = Context(1, 1, {}, RecordDict(), {})
        self.sums[label].join(run)

    def ask(self, label: str, asked) -> dict:
        node = LABELS.index(label) + 1
        return secure_stage(asked, node, self.contexts[label], self.sums[label])

    def participants(self, run: str = "run", number: int = 1) -> dict:
        """Everybody's keys, as the server relays them."""
        return {
            str(node): {"label": label, **self.ask(label, Keys(query="keys", run=run, round=number))}
            for node, label in enumerate(LABELS, 1)
        }

    def sum_of(
        self, labels=LABELS, run="run", number=1, told=lambda label: {}, forge=lambda keys: None, most=MOST
    ) -> torch.Tensor:
        """A sum of these hospitals' updates. told: what a hospital is told otherwise than the others; forge:
        changes the list of keys; most: the total that their slices are divided by."""
        participants = self.participants(run, number)
        forge(participants)
        shares = Shares.model_validate({"query": "shares", "run": run, "round": number, "keys": participants})
        sealed = {label: self.ask(label, shares)["sealed"] for label in LABELS}
        total, model = np.zeros(LENGTH, np.uint32), "m"
        for node, label in enumerate(LABELS, 1):
            theirs = {
                str(by): sealed[other][str(node)] for by, other in enumerate(LABELS, 1) if other != label
            }
            about = {"run": run, "round": number, "most": most, "model": model, "settings": "", "rate": None}
            about |= told(label)
            model_of = about.pop("model")
            task = Train(without=[], seconds=9, partition=None, sealed=theirs, **about)
            if label in labels:
                vector = masked(task, self.updates[label], 50, LIMIT, self.contexts[label], model_of)
                total = total + vector
        summed = [node for node, label in enumerate(LABELS, 1) if label in labels]
        missing = [node for node in NODES if node not in summed]
        sum_ = {"summed": summed, "missing": missing}
        codes = {node: self.ask(LABELS[node - 1], Agree(query="agree", **sum_))["codes"] for node in summed}
        given = []
        for node, label in zip(summed, labels):
            agreed = {str(by): codes[by][str(node)] for by in summed if by != node}
            given.append(self.ask(label, Unmask(query="unmask", agreed=agreed, **sum_))["shares"])
        public = {int(node): one["keys"] for node, one in participants.items()}
        names = {node: one["label"] for node, one in participants.items()}
        bound = binding(
            [run, number, most, model, "", None],
            {node: one["keys"] for node, one in participants.items()},
            names,
        )
        every = {node: [one[str(node)] for one in given] for node in NODES}
        return from_sum(unmasked(total, every, summed, public, bound), len(summed), LIMIT, len(LABELS))


@pytest.fixture
def three(tmp_path):
    return Consorts(tmp_path)


def test_an_honest_server_gets_the_sum(three):
    wanted = 0.5 * sum(three.updates[label].double() for label in LABELS)
    assert torch.allclose(three.sum_of(), wanted, atol=1e-6)


@pytest.mark.parametrize(
    "other", [{"most": 10**7}, {"model": "another"}, {"settings": '{"lr": 1e-9}'}, {"rate": 1e-9}], ids=str
)
def test_hospitals_that_were_told_different_things_give_no_sum(three, other):
    """With totals of its own for the others, the sum was the victim's update to 2e-6; a model in which the
    others learn nothing would do the same, as would a learning rate of next to nothing for the others."""
    with pytest.raises(MedFLError, match="still masked"):
        three.sum_of(told=lambda label: other if label == "cleo" else {})


def test_keys_told_to_some_otherwise_give_no_sum():
    """The masks are bound to all participants."""
    parties = {node: Party() for node in (1, 2, 3)}
    public = {str(node): party.keys(node) for node, party in parties.items()}
    other = {**public, "4": Party().keys(4)}
    assert binding(["run", 1], public, {}) != binding(["run", 1], other, {})
    assert binding(["run", 1], public, {"1": "anna"}) != binding(["run", 1], public, {"1": "bert"})


HEARD = {1: (2, 3), 2: (1, 3, 4, 5), 3: (1, 2, 4, 5), 4: (1, 2, 3, 5), 5: (1, 2, 3, 4)}  # whose shares
TOLD = {  # the hospitals in the sum, and those missing, as the server says to each
    1: ([1, 2, 3], []),
    2: ([1, 2, 4], [3, 5]),
    3: ([1, 3, 4], [2, 5]),
    4: ([1, 4, 5], [2, 3]),
    5: ([1, 4, 5], [2, 3]),
}


def test_a_server_that_tells_five_hospitals_different_members_of_the_sum_gets_no_share():
    """It gave the first one's seed and the keys of all whose masks it had: its whole update, to 1e-8, though
    no hospital was asked for two secrets of one."""
    parties = {node: Party() for node in TOLD}
    public = {str(node): party.keys(node) for node, party in parties.items()}
    sealed = {node: party.share(public, {}, ["run", 1]) for node, party in parties.items()}
    codes = {}
    for node, party in parties.items():
        theirs = {str(by): sealed[by][str(node)] for by in HEARD[node]}
        party.masked(theirs, torch.zeros(LENGTH), 0.5, LIMIT, ["run", 1, MOST, "m"])
    for node, party in parties.items():
        codes[node] = party.agree(*TOLD[node])
    for node, party in parties.items():
        agreed = {str(by): codes[by][str(node)] for by in TOLD if by != node}
        with pytest.raises(MedFLError, match="not told the same members of the sum"):
            party.reveal(*TOLD[node], agreed)


def test_shares_are_of_use_only_among_hospitals_that_were_told_the_same_participants():
    """Two of seven were told a list with the third. The other four gave the third one's key, as that of a missing
    hospital, and the sum of the two came out to 4e-8."""
    parties = {node: Party() for node in range(1, 8)}
    seven = {str(node): party.keys(node) for node, party in parties.items()}
    three = {node: seven[node] for node in ("1", "2", "3")}
    told = {node: three if node < 3 else seven for node in parties}
    sealed = {node: party.share(told[node], {}, ["run", 1]) for node, party in parties.items()}
    for node in (1, 2):
        theirs = {str(by): sealed[by][str(node)] for by in (1, 2, 3) if by != node}
        with pytest.raises(WrongShares, match="can't be opened") as caught:
            parties[node].masked(theirs, torch.zeros(LENGTH), 0.5, LIMIT, ["run", 1, MOST, "m"])
        assert caught.value.node == 3


@pytest.mark.parametrize("forge", ["another set", "no codes", "own codes", "codes for others", "made up"])
def test_codes_that_are_not_the_others_for_this_sum_open_nothing(forge):
    parties = {node: Party() for node in (1, 2, 3)}
    public = {str(node): party.keys(node) for node, party in parties.items()}
    sealed = {node: party.share(public, {}, ["run", 1]) for node, party in parties.items()}
    for node, party in parties.items():
        theirs = {str(by): sealed[by][str(node)] for by in parties if by != node}
        party.masked(theirs, torch.zeros(LENGTH), 0.5, LIMIT, ["run", 1, MOST, "m"])
    codes = {node: party.agree([1, 2, 3], []) for node, party in parties.items()}
    agreed = {
        "no codes": {},
        "own codes": {"2": codes[1]["2"], "3": codes[1]["3"]},
        "codes for others": {"2": codes[2]["3"], "3": codes[3]["2"]},
        "made up": {"2": "0" * 64, "3": "0" * 64, "9": "0" * 64, "1": codes[2]["1"]},
    }.get(forge, {"2": codes[2]["1"], "3": codes[3]["1"]})
    with pytest.raises(MedFLError, match="not told the same members of the sum"):
        parties[1].reveal(*(([1, 2], [3]) if forge == "another set" else ([1, 2, 3], [])), agreed)


@pytest.mark.parametrize("stage", ["keys", "shares", "update"])
def test_no_stage_is_answered_for_a_run_that_was_not_joined(three, stage):
    """A round that is summed under two runs' names, with a hospital and without it, gives its update."""
    asked = {"run": "another", "round": 1}
    with pytest.raises(MedFLError, match="another run than the one that was joined"):
        if stage == "keys":
            three.ask("anna", Keys(query="keys", **asked))
        elif stage == "shares":
            keys = three.participants()
            three.ask("anna", Shares.model_validate({"query": "shares", "keys": keys, **asked}))
        else:
            three.sums["anna"].check_run("another")  # as the app does before each update


def test_the_run_is_fixed_for_as_long_as_the_hospital_runs(three):
    with pytest.raises(MedFLError, match="another run than the one that was joined"):
        three.sums["anna"].join("another")
    three.start("anna", "another")  # by its people


@pytest.mark.parametrize("restart", [False, True])
def test_rounds_1_2_1_give_no_second_sum_also_after_a_restart(three, restart):
    three.sum_of()
    three.sum_of(number=2)
    if restart:
        for label in LABELS:
            three.start(label)
    with pytest.raises(MedFLError, match="another sum of a round that was summed already"):
        three.sum_of(("anna", "bert", "cleo"))
    three.sum_of()  # of the same hospitals: a server that was killed before it saved


def test_a_round_is_not_summed_by_two_totals(three):
    """A hospital of 50 slices counts 50 / 100 by the one total and whole by the other: with hospitals of other
    sizes the difference of two sums is a multiple of the smallest one's update."""
    three.sum_of()
    with pytest.raises(MedFLError, match="another sum of a round that was summed already"):
        three.sum_of(most=50)


def test_an_update_is_masked_once_a_try(three):
    """Shares of some came in a first message, which was refused for what else it held, and those of a missing
    hospital in a second: masked with the missing one alone, the update came out to 1e-8."""
    participants = three.participants()
    shares = Shares.model_validate({"query": "shares", "run": "run", "round": 1, "keys": participants})
    given = {str(node): three.ask(label, shares)["sealed"] for node, label in zip(NODES, LABELS)}
    sealed = {node: texts["1"] for node, texts in given.items() if node != "1"}
    task = {
        "run": "run",
        "round": 1,
        "most": MOST,
        "settings": "",
        "rate": None,
        "without": [],
        "seconds": 9.0,
    }
    for theirs, sentence in (
        ({**sealed, "4": "ab" * 60}, "can't be opened"),
        ({"3": sealed["3"], "4": sealed["4"]}, "twice or out of order"),
    ):
        asked = Train(**task, partition=None, sealed=theirs)
        with pytest.raises(HospitalError, match=sentence):
            masked(asked, three.updates["anna"], 50, LIMIT, three.contexts["anna"], "m")


def test_keys_of_one_round_are_not_used_in_another(three):
    with pytest.raises(MedFLError, match="another round than the keys are for"):
        three.sum_of(number=1, told=lambda label: {"round": 2})


def swapped(keys):
    """A key of the server's in the place of a hospital's, to read what is sealed for it."""
    keys["3"]["keys"] = Party().keys(3)


def invented(keys):
    keys["5"] = {"label": "emil", "keys": Party().keys(5), "signature": None}


def renamed(keys):
    keys["5"] = {**keys["3"], "label": "emil", "keys": Party().keys(5)}


def unsigned(keys):
    keys["2"]["signature"] = None


@pytest.mark.parametrize("forge", [swapped, invented, renamed, unsigned], ids=lambda forge: forge.__name__)
def test_with_kits_the_server_can_neither_exchange_keys_nor_invent_hospitals(tmp_path, forge):
    with pytest.raises(HospitalError, match="not signed by it|not in this hospital's members.pub"):
        Consorts(tmp_path, kits=True).sum_of(forge=forge)


def test_with_kits_keys_of_a_former_round_are_refused(tmp_path):
    three = Consorts(tmp_path, kits=True)
    former = three.participants(number=1)["2"]
    with pytest.raises(HospitalError, match="bert's are not signed by it"):
        three.sum_of(number=2, forge=lambda keys: keys.update({"2": former}))


def test_with_kits_an_honest_server_gets_the_sum(tmp_path):
    three = Consorts(tmp_path, kits=True)
    wanted = 0.5 * sum(three.updates[label].double() for label in LABELS)
    assert torch.allclose(three.sum_of(), wanted, atol=1e-6)


def test_a_kit_without_the_consortiums_keys_does_not_join_a_secure_aggregation(tmp_path):
    three = Consorts(tmp_path, kits=True)
    three.identities["anna"] = three.identities["anna"].model_copy(update={"members": None})
    with pytest.raises(MedFLError, match="members.pub"):
        three.start("anna")


def test_a_suspended_server_that_goes_on_beside_its_successor_opens_one_sum_of_a_round():
    """It was stopped when all updates of a round were there; the one that took its place asked for the round again,
    with another model. Then the first one goes on, and leaves a hospital out."""
    parties, everybody = {node: Party() for node in (1, 2, 3, 4)}, [1, 2, 3, 4]
    change, tries = torch.full((LENGTH,), 0.1), []

    def ask(model: str) -> None:
        public = {str(node): party.keys(node) for node, party in parties.items()}
        sealed = {node: party.share(public, {}, ["run", 1]) for node, party in parties.items()}
        of = ["run", 1, MOST, model, "", None]
        vectors = {}
        for node, party in parties.items():
            theirs = {str(by): sealed[by][str(node)] for by in sealed if by != node}
            vectors[node] = party.masked(theirs, change, 0.5, LIMIT, of)
        tries.append(({int(node): keys for node, keys in public.items()}, binding(of, public, {}), vectors))

    def open_sum(summed: list[int], missing: list[int]) -> dict[int, list[str]]:
        codes = {node: parties[node].agree(summed, missing) for node in summed}
        given = [
            parties[node].reveal(
                summed, missing, {str(by): codes[by][str(node)] for by in summed if by != node}
            )
            for node in summed
        ]
        return {node: [one[str(node)] for one in given] for node in everybody}

    ask("the suspended server's")
    ask("its successor's")
    shares = open_sum([1, 2, 3], [4])
    for number, opens in ((0, False), (1, True)):
        public, bound, vectors = tries[number]
        total = sum((vectors[node] for node in (1, 2, 3)), np.zeros(LENGTH, np.uint32))
        if opens:
            bare = unmasked(total, shares, [1, 2, 3], public, bound)
            assert torch.allclose(from_sum(bare, 3, LIMIT, 4), 1.5 * change.double(), atol=1e-6)
        else:
            with pytest.raises(MedFLError, match="wrong shares|still masked"):
                from_sum(unmasked(total, shares, [1, 2, 3], public, bound), 3, LIMIT, 4)
    with pytest.raises(MedFLError, match="twice or out of order"):
        open_sum(everybody, [])
    ask("its successor's, once more")
    with pytest.raises(MedFLError, match="another sum of a round that was summed already"):
        open_sum(everybody, [])


def test_two_tries_side_by_side_open_one_sum_of_a_round():
    """A server with two runs of Flower has both agreed on, by one hospital more and less, before it asks for the
    shares of either."""
    everybody, given = [1, 2, 3, 4], {}
    tries = [
        ({node: Party() for node in everybody}, [1, 2, 3, 4]),
        ({node: Party() for node in everybody}, [1, 2, 3]),
    ]
    codes = []
    for parties, summed in tries:
        public = {str(node): party.keys(node) for node, party in parties.items()}
        sealed = {node: party.share(public, {}, ["run", 1]) for node, party in parties.items()}
        for node, party in parties.items():
            theirs = {str(by): sealed[by][str(node)] for by in sealed if by != node}
            party.masked(theirs, torch.zeros(LENGTH), 0.5, LIMIT, ["run", 1, MOST, "m", "", None])
        missing = [node for node in everybody if node not in summed]
        codes.append({node: parties[node].agree(summed, missing) for node in summed})

    def opened(number: int, node: int) -> None:
        parties, summed = tries[number]
        parties[node].given = given.get(node, {})  # as the hospital keeps it beside both
        agreed = {str(by): codes[number][by][str(node)] for by in summed if by != node}
        parties[node].reveal(summed, [one for one in everybody if one not in summed], agreed)
        given[node] = parties[node].given

    for node in everybody:
        opened(0, node)
    for node in (1, 2, 3):
        with pytest.raises(MedFLError, match="another sum of a round that was summed already"):
            opened(1, node)


class Spoiling(RealHospital):
    """Changes what it says in a stage of secure aggregation."""

    def __init__(self, *where, stage: str, spoil):
        super().__init__(*where)
        self.stage, self.spoil = stage, spoil

    def answer(self, incoming):
        about = json.loads(incoming.content["about"]["json"])
        reply = super().answer(incoming)
        if about.get("query") != self.stage:
            return reply
        said = json.loads(reply.content["about"]["json"])
        self.spoil(said)
        return type(incoming)(message(said), reply_to=incoming)


def garbage(texts: dict) -> None:
    for node in texts:
        texts[node] = "ab" * 60


def twice(said: dict) -> None:
    said["keys"] = [said["keys"][0]] * 2


SPOILT = {
    "keys that are none": ("keys", lambda said: said.update(keys=["00" * 90, "11" * 90]), "keys .* that are none"),
    "one key twice": ("keys", twice, "keys .* that can't be used"),
    "shares that can't be opened": ("shares", lambda said: garbage(said["sealed"]), "shares or codes can't be used"),
    "shares of another secret": ("shares", lambda said: said.update(seed="0" * 64), "is not its own"),
    "another's shares changed": ("unmask", lambda said: garbage(said["shares"]), "another share of"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_who_breaks_the_protocol_is_named_and_the_round_goes_on(
    federate,
    monkeypatch,
    phantoms,
    tmp_path,
    name,
):
    monkeypatch.setattr(federation.server.secure_round, "STAGE_TIME", 5.0)
    stage, spoil, why = SPOILT[name]
    hospitals = [RealHospital(tmp_path / "out", cid, phantoms) for cid in range(3)]
    hospitals.append(Spoiling(tmp_path / "out", 3, phantoms, stage=stage, spoil=spoil))
    settings = {"clients": 4, "partition": "iid", "val_fraction": 0.0, "secure_aggregation": True}
    lost = stage == "shares" and "another secret" in name  # found when shares were given: that round is over
    state, _, _ = federate(1 + lost, hospitals=hospitals, **settings)
    log = (tmp_path / "out" / "audit.jsonl").read_text(encoding="utf-8")
    events = [json.loads(line) for line in log.splitlines()]
    named = [event for event in events if event["event"] in ("left_out", "blamed")]
    of_it = [event["why"] for event in named if event["hospital"] == "hospital-3"]
    assert any(re.search(why, said) for said in of_it), named
    counted = {row["site"] for row in state.progress.rows if row["round"] == 1 + lost}
    assert counted == {f"hospital-{k}" for k in range(4 if stage == "unmask" else 3)}


def test_keys_that_a_hospital_did_not_sign_are_its_own_failure(tmp_path, monkeypatch):
    """Every other hospital would refuse the whole list, and the run ended for one that signed nothing."""
    consorts = Consorts(tmp_path, kits=True)
    said = consorts.participants()
    said["2"] |= {"signature": said["3"]["signature"]}
    signers = {node: consorts.identities["anna"].members[label] for node, label in zip(NODES, LABELS)}
    part = Part(patients=4, slices=50)
    told = SimpleNamespace(parts={"train": part})
    members = [Member(label, node, label, told) for node, label in zip(NODES, LABELS)]
    asked = []

    def wait(purpose, of, title, limit):
        if purpose == "p-keys":
            abouts = {
                m.label: {"keys": said[str(m.node)]["keys"], "signature": said[str(m.node)]["signature"]}
                for m in of
            }
        else:
            shares = [request for _, request in asked if request["query"] == "shares"][0]
            shares = Shares.model_validate({**shares, "ticket": ""})
            abouts = {m.label: consorts.ask(m.label, shares) for m in of}
        return {label: Answer(0, purpose, about) for label, about in abouts.items()}, {}

    mailbox = SimpleNamespace(send=lambda nodes, kind, purpose, about, limit: asked.append((nodes, about)))
    settings = FederationSettings(clients=4, secure_aggregation=True)
    secure = SecureRound(mailbox, wait, settings, 1, "p", LENGTH, "run", "m", ["", None], signers)
    assert secure.prepare(members).keys() == {"anna", "cleo", "dave"}
    assert secure.failures == {"bert": "it sent keys for the secure aggregation that it did not sign"}


def test_who_gives_one_other_shares_of_no_use_is_named_beside_it(federate, phantoms, tmp_path):
    """One word is not enough to leave the named one out, and the one that can't use the shares drops out."""
    hospitals = [RealHospital(tmp_path / "out", cid, phantoms) for cid in range(3)]
    spoil = lambda said: said["sealed"].update({"1": "ab" * 60})  # noqa: E731
    hospitals.append(Spoiling(tmp_path / "out", 3, phantoms, stage="shares", spoil=spoil))
    federate(1, hospitals=hospitals, clients=4, partition="iid", val_fraction=0.0, secure_aggregation=True)
    log = (tmp_path / "out" / "audit.jsonl").read_text(encoding="utf-8")
    (left,) = [event for event in map(json.loads, log.splitlines()) if event["event"] == "left_out"]
    assert left["hospital"] == "hospital-0" and "can't use the shares or codes of hospital-3" in left["why"]


class Noise(RealHospital):
    """Sends numbers of its own in the place of its masked update."""

    def answer(self, incoming):
        reply = super().answer(incoming)
        if "sealed" not in json.loads(incoming.content["about"]["json"]):
            return reply
        numbers = np.random.default_rng(0).integers(
            0, 2**32, reply.content["arrays"]["weights"].shape[0], np.uint32
        )
        return type(incoming)(message(read(reply.content), array_record(numbers)), reply_to=incoming)


def test_an_update_that_is_noise_costs_rounds_and_the_run_goes_on_without_its_sender(
    federate, phantoms, tmp_path
):
    """The masks hide who it was. The others' shares were given, and would never have been given again: the run
    could not go on, not even without that hospital."""
    four = [RealHospital(tmp_path / "out", cid, phantoms) for cid in range(3)]
    settings = {
        "clients": 4,
        "partition": "iid",
        "val_fraction": 0.0,
        "secure_aggregation": True,
        "min_clients": 3,
    }
    with pytest.raises(AssertionError, match="the last two rounds have no sum"):
        federate(4, hospitals=[*four, Noise(tmp_path / "out", 3, phantoms)], **settings)
    state, _, _ = federate(4, hospitals=four, resume=True, round_timeout=2.0, **settings)
    counted = {(row["round"], row["site"]) for row in state.progress.rows if row["examples"] is not None}
    assert counted == {(number, f"hospital-{k}") for number in (3, 4) for k in range(3)}
