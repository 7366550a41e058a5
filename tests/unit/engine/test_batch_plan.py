from splitlearn.engine.batch_plan import BatchCounts, BatchPlan


def test_a_batch_counts_once_however_many_steps_it_has():
    plan = BatchPlan(
        steps=(3, 9), step_rows=(1, 2), slots=(0, 4, 5), lengths=(7, 7, 7), tokens=1, adapter_slots=(0, 0, 0)
    )
    ran = BatchCounts()
    ran.note(plan, 500)
    ran.note(plan, 700)
    assert ran == BatchCounts(batches=2, shared=2, ragged=0, steps=4, rows=6, device_us=1200)
