//! The steps, each as atomic as it is in the code. A stopped process is one that takes no step.

use crate::state::{
    Block, CLIENTS, ChunkKind, Client, Daemon, FRAMES, Filler, Frame, FrameState, Guard, Lease, Left, Mapped,
    Process, Reader, State, Task, WORDS,
};

/// Fences of one memory: enough for a guard to be two owners behind.
const FENCE_MAX: u8 = 3;
const INCARNATION_MAX: u8 = 2;
const DEATHS_MAX: u8 = 1;
/// The client that may die and may hold; the other one only stops and goes on.
const MORTAL: usize = 1;

/// What is built, and what is known to be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rules {
    AsBuilt,
    /// A reader trusts its lease and checks no fence.
    LeaseOnly,
    /// The same, but a frame whose lease expired is evicted only after a while.
    LeaseAndGrace,
    /// The fence moves when the new bytes are complete.
    FenceAfterOverwrite,
    /// A frame is freed while a transfer reads from it.
    HoldIgnored,
    /// A lease of an earlier life of the daemon is good for a new session.
    EarlierIncarnation,
    /// The window of a dead process is used again.
    WindowReused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    // Requests of a client, and what it does by itself.
    LeaseRead { client: usize, block: Block, reader: Reader },
    CopyPart { client: usize },
    IsValid { client: usize },
    LetFrameGo { client: usize },
    LeaseWrite { client: usize, block: Block, frame: usize },
    CopyFrom { client: usize },
    Seal { client: usize },
    Drop { client: usize },
    ReturnWindow { client: usize, frame: usize },
    Reconnect { client: usize },
    Die { client: usize },
    ChildStores { client: usize },
    Respawn { client: usize },
    // The daemon's own.
    LeaseExpired { client: usize },
    GraceOver { frame: usize },
    SessionClosed { client: usize },
    WindowOverdue { frame: usize },
    StartRead { block: Block, frame: usize },
    DeviceStores { frame: usize },
    ReadDone { frame: usize },
    VerifyDone { frame: usize },
    EvictFromPinned { frame: usize },
    CopyDone { frame: usize, target: usize },
    ChunkDropped { frame: usize },
    HoldOverdue { frame: usize },
    Crash,
    Restart,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LeaseEnd {
    Released,
    Abandoned,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vacate {
    Free,
    Quarantine,
}

/// Every step that could be taken in some state.
pub(crate) fn all_steps() -> Vec<Step> {
    use Step::{
        ChildStores, ChunkDropped, CopyDone, CopyFrom, CopyPart, Crash, DeviceStores, Die, Drop,
        EvictFromPinned, GraceOver, HoldOverdue, IsValid, LeaseExpired, LeaseRead, LeaseWrite, LetFrameGo,
        ReadDone, Reconnect, Respawn, Restart, ReturnWindow, Seal, SessionClosed, StartRead, VerifyDone,
        WindowOverdue,
    };
    let mut steps = vec![Crash, Restart];
    for client in 0..CLIENTS {
        steps.extend([CopyPart { client }, IsValid { client }, LetFrameGo { client }, CopyFrom { client }]);
        steps.extend([Seal { client }, Drop { client }, Reconnect { client }]);
        steps.push(LeaseExpired { client });
        if client == MORTAL {
            let ends = [Die { client }, ChildStores { client }, Respawn { client }, SessionClosed { client }];
            steps.extend(ends);
        }
        steps.extend((0..FRAMES).map(|frame| ReturnWindow { client, frame }));
        for block in 1..=2 {
            steps.push(LeaseRead { client, block, reader: Reader::Fence });
            if client == MORTAL {
                steps.push(LeaseRead { client, block, reader: Reader::Hold });
            }
            steps.extend((0..FRAMES).map(|frame| LeaseWrite { client, block, frame }));
        }
    }
    for frame in 0..FRAMES {
        steps.extend([GraceOver { frame }, WindowOverdue { frame }, DeviceStores { frame }]);
        steps.extend([ReadDone { frame }, VerifyDone { frame }, EvictFromPinned { frame }]);
        steps.extend([ChunkDropped { frame }, HoldOverdue { frame }]);
        steps.extend((1..=2).map(|block| StartRead { block, frame }));
        steps.extend((0..FRAMES).map(|target| CopyDone { frame, target }));
    }
    steps
}

impl Rules {
    /// The state after the step, if the step can be taken.
    pub(crate) fn take(self, state: &State, step: Step) -> Option<State> {
        let mut next = State { left: Left::Nothing, ..*state };
        self.apply(&mut next, step).then(|| next.canonical())
    }

    fn apply(self, state: &mut State, step: Step) -> bool {
        match step {
            Step::LeaseRead { client, block, reader } => lease_read(state, client, block, reader),
            Step::CopyPart { client } => copy_part(state, client),
            Step::IsValid { client } => self.is_valid(state, client),
            Step::LetFrameGo { client } => self.let_frame_go(state, client),
            Step::LeaseWrite { client, block, frame } => lease_write(state, client, block, frame),
            Step::CopyFrom { client } => copy_from(state, client),
            Step::Seal { client } => self.seal(state, client),
            Step::Drop { client } => self.drop_guard(state, client),
            Step::ReturnWindow { client, frame } => return_window(state, client, frame),
            Step::Reconnect { client } => self.reconnect(state, client),
            Step::Die { client } => die(state, client),
            Step::ChildStores { client } => child_stores(state, client),
            Step::Respawn { client } => respawn(state, client),
            Step::LeaseExpired { client } => self.lease_expired(state, client),
            Step::GraceOver { frame } => std::mem::take(&mut state.frames[frame].grace),
            Step::SessionClosed { client } => self.session_closed(state, client),
            Step::WindowOverdue { frame } => window_overdue(state, frame),
            Step::StartRead { block, frame } => start_read(state, block, frame),
            Step::DeviceStores { frame } => device_stores(state, frame),
            Step::ReadDone { frame } => self.read_done(state, frame),
            Step::VerifyDone { frame } => self.verify_done(state, frame),
            Step::EvictFromPinned { frame } => self.evict_from_pinned(state, frame),
            Step::CopyDone { frame, target } => self.copy_done(state, frame, target),
            Step::ChunkDropped { frame } => chunk_dropped(state, frame),
            Step::HoldOverdue { frame } => self.hold_overdue(state, frame),
            Step::Crash => crash(state),
            Step::Restart => restart(state),
        }
    }

    /// A reader that is done asks whether it may use what it read. Then its guard goes.
    fn is_valid(self, state: &mut State, client: usize) -> bool {
        let Some(guard) = state.clients[client].guard else { return false };
        let Task::Read { reader: Reader::Fence, taken, count: WORDS } = guard.task else { return false };
        let valid = match self {
            Self::LeaseOnly | Self::LeaseAndGrace => true,
            Self::AsBuilt
            | Self::FenceAfterOverwrite
            | Self::HoldIgnored
            | Self::EarlierIncarnation
            | Self::WindowReused => state.seen_by(guard).fence == guard.fence,
        };
        state.left = match (valid, taken == [guard.block; WORDS as usize]) {
            (true, true) => Left::Right,
            (true, false) => Left::Wrong,
            (false, false) => Left::Refused,
            (false, true) => Left::Nothing,
        };
        self.drop_guard(state, client)
    }

    /// A transfer has read everything. What it read is used; nobody can check it.
    fn let_frame_go(self, state: &mut State, client: usize) -> bool {
        let Some(guard) = state.clients[client].guard else { return false };
        let Task::Read { reader: Reader::Hold, taken, count: WORDS } = guard.task else { return false };
        state.left = if taken == [guard.block; WORDS as usize] { Left::Right } else { Left::Wrong };
        if guard.mapped == Mapped::Current {
            let frame = &mut state.frames[guard.frame];
            frame.busy = frame.busy.saturating_sub(1);
            let charged = frame.busy == 0 && std::mem::take(&mut frame.charged);
            if frame.busy == 0 && (frame.state == FrameState::Evicting || charged) {
                frame.state = FrameState::Free;
            }
        }
        state.clients[client].guard = None;
        if state.is_connected(client) {
            self.end_lease(state, client, LeaseEnd::Released);
        }
        true
    }

    /// Publishes what a lease filled; the writer goes on reading it in place.
    fn seal(self, state: &mut State, client: usize) -> bool {
        let Some(guard) = state.clients[client].guard else { return false };
        if guard.task != (Task::Write { stored: WORDS }) || !state.is_connected(client) {
            return false;
        }
        state.clients[client].guard = None;
        let held = Lease::Write { frame: guard.frame, fence: guard.fence };
        let filled = FrameState::Filling { block: guard.block, filler: Filler::Lease { client } };
        let frame = &state.frames[guard.frame];
        if state.leases[client] != held || frame.memory.fence != guard.fence || frame.state != filled {
            return true;
        }
        if state.resident(guard.block).is_some() {
            self.end_lease(state, client, LeaseEnd::Released);
            return true;
        }
        self.seal_frame(state, guard.frame, guard.block, 1, Some(client));
        let fence = state.frames[guard.frame].memory.fence;
        state.leases[client] = Lease::Read { frame: guard.frame, fence };
        let task = Task::Read { reader: Reader::Fence, taken: [0; WORDS as usize], count: 0 };
        state.clients[client].guard = Some(Guard { task, fence, ..guard });
        true
    }

    fn seal_frame(self, state: &mut State, frame: usize, block: Block, pins: u8, sealer: Option<usize>) {
        let frame = &mut state.frames[frame];
        if std::mem::take(&mut frame.bump_due) {
            frame.memory.fence += 1;
        }
        frame.state = FrameState::Sealed { block, pins, verified: sealer.is_none() };
        frame.sealer = sealer;
    }

    /// A guard is dropped, at any time; the library then releases its lease. A transfer cannot be called back.
    fn drop_guard(self, state: &mut State, client: usize) -> bool {
        let Some(guard) = state.clients[client].guard else { return false };
        if matches!(guard.task, Task::Read { reader: Reader::Hold, .. }) {
            return false;
        }
        state.clients[client].guard = None;
        if state.is_connected(client) {
            self.end_lease(state, client, LeaseEnd::Released);
        }
        true
    }

    /// The library notices that its session ended, gives its guards up and opens another.
    fn reconnect(self, state: &mut State, client: usize) -> bool {
        let Daemon::Up { incarnation } = state.daemon else { return false };
        let Client { process, session, guard, .. } = state.clients[client];
        let hold = guard.filter(|guard| matches!(guard.task, Task::Read { reader: Reader::Hold, .. }));
        if process == Process::Dead || session == incarnation || hold.is_some() {
            return false;
        }
        state.clients[client].session = incarnation;
        state.clients[client].guard = match self {
            Self::EarlierIncarnation => guard.map(|guard| Guard { mapped: Mapped::Current, ..guard }),
            Self::AsBuilt
            | Self::LeaseOnly
            | Self::LeaseAndGrace
            | Self::FenceAfterOverwrite
            | Self::HoldIgnored
            | Self::WindowReused => None,
        };
        true
    }

    fn lease_expired(self, state: &mut State, client: usize) -> bool {
        if !state.is_up() || state.leases[client] == Lease::None {
            return false;
        }
        if self == Self::LeaseAndGrace
            && let Lease::Read { frame, .. } = state.leases[client]
        {
            state.frames[frame].grace = true;
        }
        self.end_lease(state, client, LeaseEnd::Abandoned);
        true
    }

    /// Gives back what the lease holds, unless somebody took that already.
    fn end_lease(self, state: &mut State, client: usize, how: LeaseEnd) {
        let lease = std::mem::replace(&mut state.leases[client], Lease::None);
        let (Lease::Read { frame, fence } | Lease::Write { frame, fence }) = lease else { return };
        let cell = &mut state.frames[frame];
        if cell.memory.fence != fence {
            return;
        }
        match cell.state {
            FrameState::Sealed { block, pins, verified } => {
                cell.state = FrameState::Sealed { block, pins: pins.saturating_sub(1), verified };
            }
            FrameState::Filling { filler: Filler::Lease { client: filler }, .. } if filler == client => {
                let how = if how == LeaseEnd::Abandoned { Vacate::Quarantine } else { Vacate::Free };
                self.vacate(state, frame, how);
            }
            FrameState::Filling { .. }
            | FrameState::Free
            | FrameState::Evicting
            | FrameState::Quarantined => {}
        }
    }

    /// Bumps the fence of a frame, then takes what it holds away.
    fn vacate(self, state: &mut State, frame: usize, how: Vacate) {
        let frame = &mut state.frames[frame];
        if self == Self::FenceAfterOverwrite {
            frame.bump_due = true;
        } else {
            frame.memory.fence += 1;
        }
        frame.sealer = None;
        frame.state = match how {
            Vacate::Quarantine => FrameState::Quarantined,
            Vacate::Free if frame.busy > 0 && self != Self::HoldIgnored => FrameState::Evicting,
            Vacate::Free => FrameState::Free,
        };
    }

    /// The daemon hears that a socket or a process is gone.
    fn session_closed(self, state: &mut State, client: usize) -> bool {
        let owns = |frame: &Frame| frame.kind == ChunkKind::Window { owner: client };
        let idle = state.leases[client] == Lease::None && !state.frames.iter().any(owns);
        if !state.is_up() || state.clients[client].process == Process::Alive || idle {
            return false;
        }
        self.end_lease(state, client, LeaseEnd::Abandoned);
        for frame in &mut state.frames {
            if frame.sealer == Some(client) {
                frame.sealer = None;
            }
            if frame.kind == (ChunkKind::Window { owner: client }) {
                if self == Self::WindowReused {
                    adopt_window(frame);
                } else {
                    frame.kind = ChunkKind::Replacing;
                }
            }
        }
        true
    }

    /// The device has stored everything, whether or not anybody still waits.
    fn read_done(self, state: &mut State, frame: usize) -> bool {
        let FrameState::Filling { block, filler: Filler::Op { stored: WORDS } } = state.frames[frame].state
        else {
            return false;
        };
        if state.resident(block).is_some() {
            self.vacate(state, frame, Vacate::Free);
        } else {
            self.seal_frame(state, frame, block, 0, None);
        }
        true
    }

    fn verify_done(self, state: &mut State, frame: usize) -> bool {
        let FrameState::Sealed { block, pins, verified: false } = state.frames[frame].state else {
            return false;
        };
        if state.frames[frame].memory.words == [block; WORDS as usize] {
            state.frames[frame].state = FrameState::Sealed { block, pins, verified: true };
        } else {
            self.vacate(state, frame, Vacate::Free);
        }
        true
    }

    /// Of a pool or an open window: what no lease pins. Of a window that is replaced: anything, in the end.
    fn evict_from_pinned(self, state: &mut State, frame: usize) -> bool {
        let Frame { kind, state: held, grace, .. } = state.frames[frame];
        let FrameState::Sealed { pins, .. } = held else { return false };
        if (pins > 0 && kind != ChunkKind::Replacing) || grace {
            return false;
        }
        self.vacate(state, frame, Vacate::Free);
        true
    }

    /// A block leaves a window that is replaced; the copy's own bytes are verified.
    fn copy_done(self, state: &mut State, frame: usize, target: usize) -> bool {
        let Frame { kind: ChunkKind::Replacing, state: held, memory, .. } = state.frames[frame] else {
            return false;
        };
        let FrameState::Sealed { block, .. } = held else { return false };
        let free = is_free(&state.frames[target], ChunkKind::Pool);
        if frame == target || !free {
            return false;
        }
        self.vacate(state, frame, Vacate::Free);
        if memory.words == [block; WORDS as usize] {
            state.frames[target].memory.words = memory.words;
            self.seal_frame(state, target, block, 0, None);
        }
        true
    }

    /// A hold is over its limit: what it reads stays as it is, unusable and charged, until it is acknowledged.
    fn hold_overdue(self, state: &mut State, frame: usize) -> bool {
        let Frame { busy, charged, state: held, .. } = state.frames[frame];
        if !state.is_up() || busy == 0 || charged || self == Self::HoldIgnored {
            return false;
        }
        if matches!(held, FrameState::Sealed { .. }) {
            self.vacate(state, frame, Vacate::Quarantine);
        }
        state.frames[frame].state = FrameState::Quarantined;
        state.frames[frame].charged = true;
        true
    }

    /// Whether the daemon alone ends every grant, whatever the clients do or do not do, and
    /// whether every frame is usable again once the transfers have been acknowledged.
    pub(crate) fn settles(self, mut state: State) -> bool {
        self.run_daemon(&mut state);
        let granted = state.leases.iter().any(|lease| *lease != Lease::None);
        let given_up = |frame: &Frame| frame.state == FrameState::Quarantined && frame.charged;
        if granted || !state.frames.iter().all(|frame| is_at_rest(frame) || given_up(frame)) {
            return false;
        }
        for client in 0..CLIENTS {
            while copy_part(&mut state, client) {}
            self.let_frame_go(&mut state, client);
        }
        self.run_daemon(&mut state);
        state.frames.iter().all(is_at_rest)
    }

    fn run_daemon(self, state: &mut State) {
        restart(state);
        for client in 0..CLIENTS {
            self.lease_expired(state, client);
            self.session_closed(state, client);
        }
        for frame in 0..FRAMES {
            while device_stores(state, frame) {}
            self.read_done(state, frame);
            self.hold_overdue(state, frame);
            window_overdue(state, frame);
            if state.frames[frame].kind == ChunkKind::Replacing {
                self.evict_from_pinned(state, frame);
            }
            chunk_dropped(state, frame);
        }
    }
}

/// Holds nothing, or a block that nobody pins; nothing reads from it, nothing is charged.
fn is_at_rest(frame: &Frame) -> bool {
    let state = matches!(frame.state, FrameState::Free | FrameState::Sealed { pins: 0, .. });
    state && frame.busy == 0 && !frame.charged && frame.kind == ChunkKind::Pool
}

fn is_free(frame: &Frame, kind: ChunkKind) -> bool {
    frame.state == FrameState::Free && frame.kind == kind && frame.memory.fence < FENCE_MAX
}

fn lease_read(state: &mut State, client: usize, block: Block, reader: Reader) -> bool {
    let idle = state.clients[client].guard.is_none() && state.leases[client] == Lease::None;
    let Some(frame) = state.resident(block) else { return false };
    let cell = &mut state.frames[frame];
    let FrameState::Sealed { pins, verified, .. } = cell.state else { return false };
    let trusted = verified || cell.sealer == Some(client);
    if !idle || !trusted || cell.memory.fence >= FENCE_MAX {
        return false;
    }
    let fence = cell.memory.fence;
    let pinned = FrameState::Sealed { block, pins: pins + 1, verified };
    if !state.is_connected(client) {
        return false;
    }
    let cell = &mut state.frames[frame];
    cell.state = pinned;
    if reader == Reader::Hold {
        cell.busy += 1;
    }
    state.leases[client] = Lease::Read { frame, fence };
    let task = Task::Read { reader, taken: [0; WORDS as usize], count: 0 };
    state.clients[client].guard = Some(Guard { block, frame, fence, mapped: Mapped::Current, task });
    true
}

/// Reads one more word. A transfer goes on after its process has died.
fn copy_part(state: &mut State, client: usize) -> bool {
    let Some(mut guard) = state.clients[client].guard else { return false };
    let Task::Read { reader, mut taken, count } = guard.task else { return false };
    if count == WORDS {
        return false;
    }
    taken[usize::from(count)] = state.seen_by(guard).words[usize::from(count)];
    guard.task = Task::Read { reader, taken, count: count + 1 };
    state.clients[client].guard = Some(guard);
    true
}

/// A frame of the client's own window, or a new window in the place of a free chunk.
fn lease_write(state: &mut State, client: usize, block: Block, frame: usize) -> bool {
    let idle = state.clients[client].guard.is_none() && state.leases[client] == Lease::None;
    if !idle || !state.is_connected(client) || state.resident(block).is_some() {
        return false;
    }
    let kind = ChunkKind::Window { owner: client };
    if !is_free(&state.frames[frame], kind) {
        let chunk = state.frames[frame];
        if chunk.kind != ChunkKind::Pool || chunk.state != FrameState::Free || chunk.busy > 0 {
            return false;
        }
        state.replace_memory(frame, kind);
    }
    let cell = &mut state.frames[frame];
    let fence = cell.memory.fence;
    cell.state = FrameState::Filling { block, filler: Filler::Lease { client } };
    state.leases[client] = Lease::Write { frame, fence };
    let task = Task::Write { stored: 0 };
    state.clients[client].guard = Some(Guard { block, frame, fence, mapped: Mapped::Current, task });
    true
}

fn copy_from(state: &mut State, client: usize) -> bool {
    let Some(mut guard) = state.clients[client].guard else { return false };
    if !matches!(guard.task, Task::Write { stored } if stored < WORDS) {
        return false;
    }
    state.store(&mut guard);
    state.clients[client].guard = Some(guard);
    true
}

/// Only when no writer of it is left in the process, which has dropped its permission.
fn return_window(state: &mut State, client: usize, frame: usize) -> bool {
    let writes = |guard: Guard| guard.frame == frame && matches!(guard.task, Task::Write { .. });
    let Frame { kind, state: held, .. } = state.frames[frame];
    let filling = matches!(held, FrameState::Filling { .. });
    let own = kind == ChunkKind::Window { owner: client };
    if !own || filling || !state.is_connected(client) || state.clients[client].guard.is_some_and(writes) {
        return false;
    }
    adopt_window(&mut state.frames[frame]);
    true
}

fn adopt_window(frame: &mut Frame) {
    frame.kind = ChunkKind::Pool;
    if frame.state == FrameState::Quarantined && !frame.charged {
        frame.state = FrameState::Free;
    }
}

/// Nobody runs its code any more, but a child may store on, and a transfer read on.
fn die(state: &mut State, client: usize) -> bool {
    if state.clients[client].process == Process::Dead || state.deaths == DEATHS_MAX {
        return false;
    }
    let dead = &mut state.clients[client];
    dead.process = Process::Dead;
    let guard = dead.guard.take();
    dead.child = guard.filter(|guard| matches!(guard.task, Task::Write { .. }));
    dead.guard = guard.filter(|guard| matches!(guard.task, Task::Read { reader: Reader::Hold, .. }));
    state.deaths += 1;
    true
}

fn child_stores(state: &mut State, client: usize) -> bool {
    let Some(mut guard) = state.clients[client].child else { return false };
    if guard.task == (Task::Write { stored: WORDS }) {
        state.clients[client].child = None;
        return true;
    }
    state.store(&mut guard);
    state.clients[client].child = Some(guard);
    true
}

/// A new process, after the daemon has heard of the end of the old one.
fn respawn(state: &mut State, client: usize) -> bool {
    let owns = |frame: &Frame| frame.kind == ChunkKind::Window { owner: client };
    let Daemon::Up { incarnation } = state.daemon else { return false };
    let old = state.clients[client];
    let forgotten = state.leases[client] == Lease::None && !state.frames.iter().any(owns);
    if old.process == Process::Alive || old.guard.is_some() || !forgotten {
        return false;
    }
    state.clients[client] = Client { process: Process::Alive, session: incarnation, ..old };
    true
}

fn window_overdue(state: &mut State, frame: usize) -> bool {
    let cell = &mut state.frames[frame];
    if !matches!(cell.kind, ChunkKind::Window { .. }) || matches!(cell.state, FrameState::Filling { .. }) {
        return false;
    }
    cell.kind = ChunkKind::Replacing;
    true
}

/// Every block is on a device as well.
fn start_read(state: &mut State, block: Block, frame: usize) -> bool {
    let reads = |cell: &Frame| matches!(cell.state, FrameState::Filling { block: of, filler: Filler::Op { .. } } if of == block);
    if !state.is_up()
        || state.resident(block).is_some()
        || state.frames.iter().any(reads)
        || !is_free(&state.frames[frame], ChunkKind::Pool)
    {
        return false;
    }
    state.frames[frame].state = FrameState::Filling { block, filler: Filler::Op { stored: 0 } };
    true
}

fn device_stores(state: &mut State, frame: usize) -> bool {
    let cell = &mut state.frames[frame];
    let FrameState::Filling { block, filler: Filler::Op { stored } } = cell.state else { return false };
    if stored == WORDS {
        return false;
    }
    cell.memory.words[usize::from(stored)] = block;
    cell.state = FrameState::Filling { block, filler: Filler::Op { stored: stored + 1 } };
    true
}

/// The memory of a replaced window comes back when nothing is left in it.
fn chunk_dropped(state: &mut State, frame: usize) -> bool {
    let Frame { kind, state: held, busy, .. } = state.frames[frame];
    let empty = matches!(held, FrameState::Free | FrameState::Quarantined) && busy == 0;
    if kind != ChunkKind::Replacing || !empty {
        return false;
    }
    state.replace_memory(frame, ChunkKind::Pool);
    true
}

/// All memory of the daemon is gone, except for those who have it mapped.
fn crash(state: &mut State) -> bool {
    let Daemon::Up { incarnation } = state.daemon else { return false };
    if incarnation == INCARNATION_MAX {
        return false;
    }
    for frame in 0..FRAMES {
        state.replace_memory(frame, ChunkKind::Pool);
    }
    state.leases = [Lease::None; CLIENTS];
    state.daemon = Daemon::Down { incarnation };
    true
}

fn restart(state: &mut State) -> bool {
    let Daemon::Down { incarnation } = state.daemon else { return false };
    state.daemon = Daemon::Up { incarnation: incarnation + 1 };
    true
}
