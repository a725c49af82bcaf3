"""DDP tuned by hand, for honesty's sake: bf16, channels_last, fused AdamW, data in memory."""

import sys

import by_hand

sys.argv.append("--bf16")
by_hand.main()
