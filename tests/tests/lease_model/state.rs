//! One daemon, two frames, two clients, two blocks: everything that the steps change.

/// Clients of the model.
pub(crate) const CLIENTS: usize = 2;
/// Frames of the model, each in a chunk of its own.
pub(crate) const FRAMES: usize = 2;
/// Words of a block: two, so that a torn copy shows.
pub(crate) const WORDS: u8 = 2;

/// A block, which is also what each of its words says. 0 is no block's.
pub(crate) type Block = u8;
pub(crate) type Words = [u8; WORDS as usize];

/// One memfd with its fence page. A dropped chunk's lives on in whoever has mapped it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Memory {
    pub(crate) words: Words,
    /// The fence as readers see it.
    pub(crate) fence: u8,
}

impl Memory {
    /// As a new chunk has it: all fences of all lives begin at 1.
    pub(crate) const NEW: Self = Self { words: [0; WORDS as usize], fence: 1 };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum ChunkKind {
    Pool,
    Window { owner: usize },
    Replacing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Filler {
    Lease { client: usize },
    Op { stored: u8 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum FrameState {
    Free,
    Filling { block: Block, filler: Filler },
    Sealed { block: Block, pins: u8, verified: bool },
    Evicting,
    Quarantined,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Frame {
    pub(crate) kind: ChunkKind,
    pub(crate) state: FrameState,
    pub(crate) memory: Memory,
    /// Transfers that read from it and cannot check a fence.
    pub(crate) busy: u8,
    /// Of those: over the limit of a hold, charged to their tenant.
    pub(crate) charged: bool,
    /// Who sealed what is not verified.
    pub(crate) sealer: Option<usize>,
    /// Wrong variant with a grace period: the last lease's is not over.
    pub(crate) grace: bool,
    /// Wrong variant that bumps late: the fence has still to move.
    pub(crate) bump_due: bool,
}

impl Frame {
    pub(crate) const NEW: Self = Self {
        kind: ChunkKind::Pool,
        state: FrameState::Free,
        memory: Memory::NEW,
        busy: 0,
        charged: false,
        sealer: None,
        grace: false,
        bump_due: false,
    };
}

/// Whether a guard's memory is still its frame's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Mapped {
    Current,
    Dropped(Memory),
}

/// How a reader knows that what it read was the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Reader {
    /// Reads, then checks the fence.
    Fence,
    /// A transfer that cannot check: it has a hold.
    Hold,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Task {
    Read { reader: Reader, taken: Words, count: u8 },
    Write { stored: u8 },
}

/// What a client has of a frame: a `ReadBlock` or a `WriteBlock`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Guard {
    pub(crate) block: Block,
    pub(crate) frame: usize,
    pub(crate) fence: u8,
    pub(crate) mapped: Mapped,
    pub(crate) task: Task,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Process {
    Alive,
    Dead,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Client {
    pub(crate) process: Process,
    /// The life of the daemon in which its session was opened.
    pub(crate) session: u8,
    pub(crate) guard: Option<Guard>,
    /// A child that goes on storing after its parent died.
    pub(crate) child: Option<Guard>,
}

/// The daemon's side of a guard's lease. It ends once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Lease {
    None,
    /// Its chunk was dropped: it holds nothing any more.
    Empty,
    Read {
        frame: usize,
        fence: u8,
    },
    Write {
        frame: usize,
        fence: u8,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Daemon {
    Up { incarnation: u8 },
    Down { incarnation: u8 },
}

/// What the last step let out of a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Left {
    Nothing,
    /// The block that was asked for.
    Right,
    /// Other bytes.
    Wrong,
    /// Nothing: the reader was told that it has other bytes.
    Refused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct State {
    pub(crate) daemon: Daemon,
    pub(crate) frames: [Frame; FRAMES],
    pub(crate) leases: [Lease; CLIENTS],
    pub(crate) clients: [Client; CLIENTS],
    pub(crate) left: Left,
    pub(crate) deaths: u8,
}

impl State {
    pub(crate) const NEW: Self = Self {
        daemon: Daemon::Up { incarnation: 1 },
        frames: [Frame::NEW; FRAMES],
        leases: [Lease::None; CLIENTS],
        clients: [Client { process: Process::Alive, session: 1, guard: None, child: None }; CLIENTS],
        left: Left::Nothing,
        deaths: 0,
    };

    /// The same state for every state that differs in nothing but the numbers of frames and blocks.
    pub(crate) fn canonical(self) -> Self {
        let swapped = self.with_frames_swapped();
        self.min(swapped).min(self.with_blocks_swapped()).min(swapped.with_blocks_swapped())
    }

    fn guards(&mut self) -> impl Iterator<Item = &mut Guard> {
        self.clients.iter_mut().flat_map(|client| [&mut client.guard, &mut client.child]).flatten()
    }

    fn with_frames_swapped(mut self) -> Self {
        self.frames.swap(0, 1);
        self.guards().for_each(|guard| guard.frame = 1 - guard.frame);
        for lease in &mut self.leases {
            if let Lease::Read { frame, .. } | Lease::Write { frame, .. } = lease {
                *frame = 1 - *frame;
            }
        }
        self
    }

    fn with_blocks_swapped(mut self) -> Self {
        let swap = |block: &mut Block| *block = [0, 2, 1][usize::from(*block)];
        for frame in &mut self.frames {
            frame.memory.words.iter_mut().for_each(swap);
            if let FrameState::Filling { block, .. } | FrameState::Sealed { block, .. } = &mut frame.state {
                swap(block);
            }
        }
        for guard in self.guards() {
            swap(&mut guard.block);
            if let Mapped::Dropped(memory) = &mut guard.mapped {
                memory.words.iter_mut().for_each(swap);
            }
            if let Task::Read { taken, .. } = &mut guard.task {
                taken.iter_mut().for_each(swap);
            }
        }
        self
    }

    pub(crate) fn is_up(&self) -> bool {
        matches!(self.daemon, Daemon::Up { .. })
    }

    /// Whether requests of this client reach a session.
    pub(crate) fn is_connected(&self, client: usize) -> bool {
        let Client { process, session, .. } = self.clients[client];
        process == Process::Alive && self.daemon == Daemon::Up { incarnation: session }
    }

    /// The frame that holds a block.
    pub(crate) fn resident(&self, wanted: Block) -> Option<usize> {
        self.frames
            .iter()
            .position(|frame| matches!(frame.state, FrameState::Sealed { block, .. } if block == wanted))
    }

    /// The memory that a guard sees.
    pub(crate) fn seen_by(&self, guard: Guard) -> Memory {
        match guard.mapped {
            Mapped::Current => self.frames[guard.frame].memory,
            Mapped::Dropped(memory) => memory,
        }
    }

    /// Stores one word through a mapping, whatever the daemon thinks of it.
    pub(crate) fn store(&mut self, guard: &mut Guard) {
        let Task::Write { stored } = guard.task else { return };
        let memory = match &mut guard.mapped {
            Mapped::Current => &mut self.frames[guard.frame].memory,
            Mapped::Dropped(memory) => memory,
        };
        memory.words[usize::from(stored)] = guard.block;
        guard.task = Task::Write { stored: stored + 1 };
    }

    /// The frame's chunk is dropped; a new one takes its place. Who has mapped the old one keeps it.
    pub(crate) fn replace_memory(&mut self, frame: usize, kind: ChunkKind) {
        let memory = self.frames[frame].memory;
        for client in &mut self.clients {
            for guard in [&mut client.guard, &mut client.child].into_iter().flatten() {
                if guard.frame == frame && guard.mapped == Mapped::Current {
                    guard.mapped = Mapped::Dropped(memory);
                }
            }
        }
        for lease in &mut self.leases {
            if matches!(lease, Lease::Read { frame: of, .. } | Lease::Write { frame: of, .. } if *of == frame)
            {
                *lease = Lease::Empty;
            }
        }
        self.frames[frame] = Frame { kind, ..Frame::NEW };
    }
}
