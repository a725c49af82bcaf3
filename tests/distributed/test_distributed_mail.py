"""Letters between threads of ranks: in order, with their payloads, and the last ones answered."""

from typing import Any

import torch

ASK, ANSWER = 1, 2


def _write(context: Any, letters: int) -> Any:
    from shoal.comm import Groups, Letter, Mail

    place = context.rank, context.world_size, context.store, context.generation
    groups = Groups.form(*place, mail=True, timeout_s=60)
    assert groups.mail is not None
    got: dict[int, list[list[float]]] = {ASK: [], ANSWER: []}

    def handle(letter: Letter) -> None:
        number = letter.numbers[0]
        values = [] if letter.payload is None else letter.payload.tolist()
        got[letter.kind].append([letter.source, number, *values])
        if letter.kind == ASK:
            payload = torch.full((int(number) % 3,), number, dtype=torch.float64)
            mail.send(letter.source, ANSWER, (number,), payload, "parameter")

    mail = Mail(groups.mail, torch.float64, handle)
    mail.start()
    for number in range(letters):
        for rank in range(context.world_size):
            mail.send(rank, ASK, (number + 0.5,))
    mail.close()  # at once: what was asked is answered all the same
    sent = mail.counter.as_dict()["send"]
    groups.close()
    return [sorted(got[ASK]), [each for each in got[ANSWER] if each[0] == 0], sent]


def test_every_letter_is_answered_in_order_before_the_end(pool: Any) -> None:
    for asked, of_rank_0, sent in pool.call(_write, 20, ranks=3):
        assert asked == [[rank, number + 0.5] for rank in range(3) for number in range(20)]
        wanted = [[0, number + 0.5, *[number + 0.5] * (number % 3)] for number in range(20)]
        assert of_rank_0 == wanted
        assert sent["parameter"] == 2 * 8 * sum(number % 3 for number in range(20))
