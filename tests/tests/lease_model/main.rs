//! Every history of a small node: one daemon, two clients, two frames, two blocks of two words.
//!
//! Each step of the model is one of the code, under the same name and as atomic as there. Processes run in any
//! order and at any speed: a client that was stopped is one that takes no step while its lease expires, its frame is
//! evicted and filled anew, and the daemon starts again. A client may die and leave a child that goes on storing.
//!
//! | step | code |
//! |---|---|
//! | `LeaseRead`, `LeaseWrite` | `core/src/reading.rs: pin_resident`, `core/src/writing.rs: reserve` with `take_window_frame`, `create_chunk` |
//! | `CopyPart`, `IsValid` | `lane/src/shared.rs: copy_part`, then `client/src/read.rs: ReadBlock::is_valid` |
//! | `CopyFrom`, `Seal`, `Drop` | `lane/src/mapping.rs: copy_from`; `writing.rs: seal_one, publish_frame`; the guards, and `leases.rs: release, abort` |
//! | `LeaseExpired`, `SessionClosed` | `core/src/leases.rs: lease_expired, session_closed, end_lease, let_go` |
//! | `ReturnWindow`, `WindowOverdue` | `core/src/windows.rs: return_window, window_closed (of a client that has dropped its permission), adopt_window, window_overdue, replace_window` |
//! | `CopyDone`, `ChunkDropped` | `core/src/memory.rs: copy_done, move_copy, chunk_dropped` |
//! | `StartRead`, `DeviceStores`, `ReadDone` | `reading.rs: start_read`, the device, `read_done` |
//! | `VerifyDone`, `EvictFromPinned` | `reading.rs: verify_done`; `memory.rs: evict_from_pinned`, by `residence.rs: vacate` |
//! | `LetFrameGo`, `HoldOverdue` | `residence.rs: hold_frame, let_frame_go`. In the daemon its own device writes and copies hold frames like this; holds of clients, and their limit, are not built yet |
//! | `Crash`, `Restart`, `Reconnect` | a new incarnation, `leases.rs: own_lease`; `client/src/chunks.rs: forget_all`, and a new session |
//!
//! All histories of up to [`STEPS_MAX`] steps are walked; `TERRACE_MODEL_STEPS` walks longer ones. States that differ
//! in nothing but the numbers of frames and blocks count once. A reader of the model accepts by the fence alone: what it knows of its lease may be arbitrarily old.

mod state;
mod steps;

use std::sync::LazyLock;

use stateright::{Checker, HasDiscoveries, Model, Property};

use crate::state::{FrameState, Lease, Left, State};
use crate::steps::{Rules, Step, all_steps};

const EXACT: &str = "what leaves a reader is the block that it asked for";
const PINS: &str = "a frame is pinned by exactly the leases that hold it";
const ENDS: &str = "every grant ends, and no frame leaks";
const SERVED: &str = "a block leaves a reader";
const REFUSED: &str = "a reader with other bytes in its hands is refused";

/// Length of the histories that are walked. Each of the wrong rules shows within it.
const STEPS_MAX: usize = 14;

/// Those that cannot be taken in a state are left out when they are tried.
static STEPS: LazyLock<Vec<Step>> = LazyLock::new(all_steps);

impl Model for Rules {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![State::NEW]
    }

    fn actions(&self, _: &State, actions: &mut Vec<Step>) {
        actions.extend_from_slice(&STEPS);
    }

    fn next_state(&self, state: &State, step: Step) -> Option<State> {
        self.take(state, step)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let exact = Property::always(EXACT, |_, state: &State| state.left != Left::Wrong);
        if *self != Self::AsBuilt {
            return vec![exact];
        }
        vec![
            exact,
            Property::always(PINS, |_, state: &State| pins_add_up(state)),
            Property::always(ENDS, |rules: &Self, state: &State| rules.settles(*state)),
            Property::sometimes(SERVED, |_, state: &State| state.left == Left::Right),
            Property::sometimes(REFUSED, |_, state: &State| state.left == Left::Refused),
        ]
    }
}

fn pins_add_up(state: &State) -> bool {
    state.frames.iter().enumerate().all(|(index, frame)| {
        let FrameState::Sealed { pins, .. } = frame.state else { return true };
        let held = Lease::Read { frame: index, fence: frame.memory.fence };
        usize::from(pins) == state.leases.iter().filter(|lease| **lease == held).count()
    })
}

/// Two readers, a stopped writer, an orphan, a restart: any order of their steps could let other bytes through,
/// leave a grant for ever, or lose a frame. Walk all of them.
#[test]
fn every_history_is_exact() {
    let chosen = std::env::var("TERRACE_MODEL_STEPS").ok().and_then(|text| text.parse().ok());
    // The checker counts states, the first one included.
    let depth = 1 + chosen.unwrap_or(STEPS_MAX);
    let checker = Rules::AsBuilt.checker().threads(2).target_max_depth(depth).spawn_bfs().join();
    println!("{} states, {} after other steps", checker.unique_state_count(), checker.state_count());
    checker.assert_properties();
    assert!(checker.unique_state_count() >= 1_000_000, "{} states are few", checker.unique_state_count());
}

/// The model must be able to find what is wrong, or it proves nothing.
fn assert_wrong(rules: Rules) {
    let checker =
        rules.checker().threads(2).finish_when(HasDiscoveries::AllOf([EXACT].into())).spawn_bfs().join();
    let path = checker.discovery(EXACT).unwrap_or_else(|| panic!("{rules:?} passes"));
    let steps = path.into_actions();
    println!("{rules:?} after {} steps: {steps:#?}", steps.len());
    assert!(steps.len() <= STEPS_MAX, "{rules:?} shows only after {} steps", steps.len());
}

/// A reader that was stopped after its lease had been granted finds another block's bytes and uses them.
#[test]
fn a_lease_alone_is_wrong() {
    assert_wrong(Rules::LeaseOnly);
}

/// It may be stopped for longer than any grace.
#[test]
fn a_grace_period_is_wrong() {
    assert_wrong(Rules::LeaseAndGrace);
}

/// Half of the new bytes are there, and the fence still says that they are the old ones.
#[test]
fn a_fence_after_the_overwrite_is_wrong() {
    assert_wrong(Rules::FenceAfterOverwrite);
}

/// A transfer that cannot check its fence reads what came after its block.
#[test]
fn ignoring_a_hold_is_wrong() {
    assert_wrong(Rules::HoldIgnored);
}

/// Fences of all lives begin at 1: an old guard's may be that of another block.
#[test]
fn a_lease_of_an_earlier_life_is_wrong() {
    assert_wrong(Rules::EarlierIncarnation);
}

/// The child of a dead writer stores into what is somebody else's frame by now.
#[test]
fn a_window_used_again_is_wrong() {
    assert_wrong(Rules::WindowReused);
}
