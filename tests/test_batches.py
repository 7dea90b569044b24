import itertools

import pytest
import torch
from tiny import token_batch

from nsc_fast.batches import BatchStream, join, without_labels
from nsc_fast.batches import token_batch as one_task
from nsc_fast.errors import MergeError
from nsc_fast.monitor import TokenBatch


def row(value: int) -> dict:
    return {"input_ids": torch.full((1, 3), value), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}


def values(stream: BatchStream, count: int) -> list[int]:
    return [int(stream.next()["input_ids"][0, 0]) for _ in range(count)]


class TestStream:
    def test_every_round_shows_every_batch_in_a_new_order(self):
        seen = values(BatchStream("t", [row(i) for i in range(6)], seed=0), 18)
        rounds = [seen[i : i + 6] for i in (0, 6, 12)]
        assert all(sorted(r) == list(range(6)) for r in rounds)
        assert len({tuple(r) for r in rounds}) > 1

    def test_the_seed_fixes_the_order(self):
        data = [row(i) for i in range(6)]
        assert values(BatchStream("t", data, 3), 12) == values(BatchStream("t", data, 3), 12)
        assert values(BatchStream("t", data, 3), 12) != values(BatchStream("t", data, 4), 12)

    def test_the_order_does_not_depend_on_the_global_generator(self):
        data = [row(i) for i in range(6)]
        torch.manual_seed(1)
        first = values(BatchStream("t", data, 3), 12)
        torch.manual_seed(2)
        state = torch.get_rng_state()
        assert values(BatchStream("t", data, 3), 12) == first
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_one_shot_iterator_is_kept(self):
        stream = BatchStream("t", (row(i) for i in range(3)), seed=0)
        assert sorted(values(stream, 3)) == sorted(values(stream, 3)) == [0, 1, 2]

    def test_a_loader_is_iterated_again_and_keeps_its_own_order(self):
        class Loader:
            rounds = 0

            def __iter__(self):
                self.rounds += 1
                return iter([row(10 * self.rounds), row(10 * self.rounds + 1)])

        assert values(BatchStream("t", Loader(), seed=0), 5) == [10, 11, 20, 21, 30]

    def test_labels_are_never_read(self):
        batch = {**row(1), "labels": torch.zeros(0), "label": None, "token_type_ids": None}
        assert set(BatchStream("t", [batch], 0).next()) == {"input_ids", "attention_mask"}
        assert set(without_labels(batch)) == {"input_ids", "attention_mask"}

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ([], "the data holds no batch"),
            (iter([]), "the data holds no batch"),
            ([{}], "a batch is empty"),
            ([{"labels": torch.ones(1)}], "a batch is empty"),
            ([{"input_ids": torch.zeros(0, 4)}], "a batch is empty"),
            ([{"input_ids": torch.zeros(2, 0)}], "a batch is empty"),
            ([{**row(1), "attention_mask": torch.zeros(1, 3)}], "a batch is fully masked"),
        ],
    )
    def test_a_batch_that_cannot_be_used_names_its_task(self, data, message):
        with pytest.raises(MergeError, match=f"task 'vqa': {message}"):
            BatchStream("vqa", data, seed=0).next()


class TestJoin:
    def test_shorter_sequences_are_padded_and_masked(self):
        a, b = token_batch(2, 5, 1, padding=2), token_batch(3, 7, 2)
        joined, tokens = join({0: a, 2: b})
        assert joined["input_ids"].shape == joined["attention_mask"].shape == (5, 7)
        assert torch.equal(joined["input_ids"][:2, :5], a["input_ids"])
        assert torch.equal(joined["input_ids"][2:], b["input_ids"])
        assert not joined["attention_mask"][:2, 5:].any()
        assert torch.equal(joined["attention_mask"][:2, :5], a["attention_mask"])
        assert tokens.task.tolist() == [0, 0, 2, 2, 2]
        assert torch.equal(tokens.mask, joined["attention_mask"])

    def test_different_lengths_without_masks_get_them(self):
        a, b = (token_batch(1, n, 1) for n in (4, 6))
        del a["attention_mask"], b["attention_mask"]
        joined, tokens = join({0: a, 1: b})
        assert joined["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
        assert torch.equal(tokens.mask, joined["attention_mask"])

    def test_equal_lengths_without_masks_need_none(self):
        a, b = ({"input_ids": torch.ones(2, 4, dtype=torch.int64)} for _ in range(2))
        joined, tokens = join({0: a, 1: b})
        assert set(joined) == {"input_ids"} and tokens.mask is None

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_one_mask_for_two_parts(self, order):
        a, b = token_batch(1, 4, 1, padding=1), token_batch(1, 4, 2)
        del b["attention_mask"]
        parts = dict(itertools.islice(((k, (a, b)[k]) for k in order), 2))
        joined, tokens = join(parts)
        assert tokens.mask[tokens.task == 0].tolist() == [[1, 1, 1, 0]]
        assert tokens.mask[tokens.task == 1].tolist() == [[1, 1, 1, 1]]

    def test_other_sequence_inputs_are_padded_with_the_ids(self):
        a, b = token_batch(1, 4, 1), token_batch(1, 6, 2)
        a["token_type_ids"], b["token_type_ids"] = (torch.ones(1, n, dtype=torch.int64) for n in (4, 6))
        joined, _ = join({0: a, 1: b})
        assert joined["token_type_ids"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]

    def test_embeddings_are_padded_in_the_sequence(self):
        a, b = ({"inputs_embeds": torch.ones(1, n, 8)} for n in (3, 5))
        joined, tokens = join({0: a, 1: b})
        assert joined["inputs_embeds"].shape == (2, 5, 8) and not joined["inputs_embeds"][0, 3:].any()
        assert tokens.mask.tolist() == [[1, 1, 1, 0, 0], [1] * 5]

    def test_images_of_one_size(self):
        a, b = ({"pixel_values": torch.ones(n, 3, 4, 4)} for n in (2, 1))
        joined, tokens = join({0: a, 1: b})
        assert joined["pixel_values"].shape == (3, 3, 4, 4)
        assert tokens.task.tolist() == [0, 0, 1] and tokens.mask is None

    @pytest.mark.parametrize(
        ("a", "b"),
        [
            ({"input_ids": torch.ones(1, 4)}, {"pixel_values": torch.ones(1, 3, 4, 4)}),
            ({"pixel_values": torch.ones(1, 3, 4, 4)}, {"pixel_values": torch.ones(1, 3, 8, 8)}),
            ({"inputs_embeds": torch.ones(1, 4, 8)}, {"inputs_embeds": torch.ones(1, 4, 6)}),
            (
                {"input_ids": torch.ones(1, 4), "attention_mask": torch.ones(1, 1, 4, 4)},
                {"input_ids": torch.ones(1, 4), "attention_mask": torch.ones(1, 1, 4, 4)},
            ),
            (
                {"input_ids": torch.ones(1, 4), "token_type_ids": torch.ones(1, 4)},
                {"input_ids": torch.ones(1, 4)},
            ),
        ],
    )
    def test_what_does_not_fit_together_is_not_joined(self, a, b):
        assert join({0: a, 1: b}) is None
        assert join({0: b, 1: a}) is None

    def test_too_much_padding_is_not_worth_it(self):
        parts = {0: token_batch(1, 2, 1), 1: token_batch(1, 10, 2)}  # 20 tokens for 12
        assert join(parts, max_padding=1.5) is None
        assert join(parts, max_padding=1.7) is not None
        assert join(parts) is not None

    def test_the_parts_are_not_changed(self):
        a, b = token_batch(1, 4, 1), token_batch(1, 6, 2)
        del a["attention_mask"]
        join({0: a, 1: b})
        assert set(a) == {"input_ids"} and a["input_ids"].shape == (1, 4)


class TestTokenBatch:
    def test_one_tasks_batch(self):
        batch = token_batch(2, 3, 1, padding=1)
        tokens = one_task(batch, 4, torch.device("cpu"))
        assert tokens.task.tolist() == [4, 4] and torch.equal(tokens.mask, batch["attention_mask"])
        assert one_task({"pixel_values": torch.ones(3, 1, 2, 2)}, 0, torch.device("cpu")).mask is None

    @pytest.mark.parametrize("leading", [(2, 3), (6,)])
    def test_every_token_gets_its_task_and_its_mask(self, leading):
        mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        task, weight = TokenBatch(torch.tensor([5, 7]), mask).tokens(torch.Size(leading), "m")
        assert task.tolist() == [5, 5, 5, 7, 7, 7]
        assert weight.tolist() == [1, 1, 0, 1, 0, 0]

    @pytest.mark.parametrize(("leading", "count"), [((2, 4), 4), ((2, 3, 2), 6), ((2,), 1)])
    def test_without_a_mask_every_token_counts(self, leading, count):
        task, weight = TokenBatch(torch.tensor([5, 7])).tokens(torch.Size(leading), "m")
        assert task.tolist() == [5] * count + [7] * count and weight.tolist() == [1.0] * 2 * count

    def test_a_pooled_activation_counts_once_a_sequence(self):
        tokens = TokenBatch(torch.tensor([5, 7]), torch.tensor([[1, 1, 0], [1, 0, 0]]))
        task, weight = tokens.tokens(torch.Size((2,)), "pooler")
        assert task.tolist() == [5, 7] and weight.tolist() == [1.0, 1.0]

    @pytest.mark.parametrize(
        ("leading", "mask"), [((3, 2), True), ((2, 4), True), ((5,), True), ((6,), False), ((3, 2), False)]
    )
    def test_activations_that_do_not_fit_name_the_module(self, leading, mask):
        tokens = TokenBatch(torch.tensor([5, 7]), torch.ones(2, 3) if mask else None)
        with pytest.raises(
            ValueError, match="module 'layers.0.qkv' receives activations .* leave the module out"
        ):
            tokens.tokens(torch.Size(leading), "layers.0.qkv")
