"""What the machine does not see: for people, here and in docs/compiled.md."""

NOT_SEEN = (
    "the machine code that ptxas makes of the PTX, and time",
    "races between the threads of one warp. What one of them orders for itself, by an mbarrier or "
    "a wait, counts for its warp; a proxy fence by some of them orders what the warp did before "
    "its last barrier",
    "atomics of global memory in races: `atom`, `red` and bulk reductions are exempt, also against "
    "plain accesses of other programs. Fences, flags and locks between programs order nothing, so "
    "plain accesses that they do order are reported as races; and a program that waits for one "
    "that has not begun (`Options.lanes` threads run together) waits until `Options.max_steps`",
    "accesses to the gaps between tensors of one storage, and between rows of a strided one: from "
    "the first to the last element that a kernel was given, a storage is one piece",
    "the third program that reads a byte of global memory, or the third warp of one program with "
    "no barrier between (two readers are remembered), and races in tensors of more than 256 MiB. "
    "Bytes are followed in pieces as small as the smallest store of the kernel (global memory: one "
    "byte or two) or access (shared memory: up to four)",
    "what becomes of the source of an asynchronous copy between its issue and its wait: `cp.async` "
    "and TMA read global memory at once; and what atomics did to shared memory that wgmma or a "
    "bulk store then reads",
    "the proxies of global memory, and fences between an ordinary access and a later TMA load "
    "into the same shared memory, where compilers rely on the barrier alone",
    "last bits: what the hardware approximates (`ex2`, `lg2`, `sin`, `rcp`, `rsqrt`, `div.full`) "
    "is exact to its type, a fused multiply-add is rounded twice (one in 2**29 differs), and sums "
    "in tensor cores are exact before they are cut",
)
