//! A write-heavy load that knows what it was promised, for tests that take the
//! daemon away under it: whatever comes back must be exact, and what was
//! acknowledged as durable must come back.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use terrace_client::{ClientError, Durability, MatchMode, SealOutcome, Session, Space, Target};

use super::{Random, Running, content, granted, manifest_of};

pub(crate) const LOAD_BYTES: usize = 16 << 10;
/// Blocks of one space. All spaces together fit the device, so that nothing is evicted.
const KEYS_MAX: u32 = 1400;
/// Two for each writer.
const SPACES: u32 = 4;
const WAIT: Duration = Duration::from_secs(20);

/// What is known of one space.
struct Promises {
    rank: u32,
    /// As the daemon told it last.
    generation: u64,
    /// Keys below this may exist.
    keys: u32,
    durable: BTreeSet<u32>,
    /// A clear was asked for and not answered.
    clearing: bool,
}

/// What the load has seen.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) written: u64,
    pub(crate) durable: u64,
    pub(crate) clears: u64,
    pub(crate) clears_cut: u64,
    pub(crate) checked: u64,
    pub(crate) misses: u64,
}

pub(crate) struct Load {
    spaces: Vec<Arc<Mutex<Promises>>>,
    seen: Arc<Mutex<Seen>>,
    cut: Arc<AtomicBool>,
}

impl Load {
    pub(crate) fn new() -> Self {
        let promises =
            |rank| Promises { rank, generation: 0, keys: 0, durable: BTreeSet::new(), clearing: false };
        let spaces = (0..SPACES).map(|rank| Arc::new(Mutex::new(promises(rank)))).collect();
        Self { spaces, seen: Arc::default(), cut: Arc::default() }
    }

    pub(crate) fn seen(&self) -> Seen {
        *self.seen.lock().unwrap()
    }

    /// The power goes now. Answers that come later would never have come, so they promise nothing: a sync that runs
    /// while ext4 is shut down may end well although the journal was dropped.
    pub(crate) fn power_goes(&self) {
        self.cut.store(true, Ordering::SeqCst);
    }

    /// Starts two writers, one on each transport, which end when the daemon does.
    pub(crate) fn start(&self, daemon: &Running, random: &mut Random) -> Vec<tokio::task::JoinHandle<()>> {
        self.cut.store(false, Ordering::SeqCst);
        let mut writers = Vec::new();
        for (lane, spaces) in [(true, &self.spaces[..2]), (false, &self.spaces[2..])] {
            let writer = Writer {
                spaces: spaces.to_vec(),
                seen: Arc::clone(&self.seen),
                cut: Arc::clone(&self.cut),
                random: Random::new(random.next()),
            };
            writers.push(tokio::spawn(writer.run(daemon.target(lane))));
        }
        writers
    }

    /// What came back. `every` reads all blocks, not a sample.
    pub(crate) async fn check(&self, daemon: &Running, random: &mut Random, every: bool) {
        let lane = random.percent(50);
        let session = daemon.session(lane).await;
        for promises in &self.spaces {
            let rank = promises.lock().unwrap().rank;
            let space = session.open_space(&manifest_of(rank, LOAD_BYTES)).await.unwrap();
            {
                let mut promises = promises.lock().unwrap();
                promises.began(space.generation());
            }
            self.check_space((&session, lane), &space, promises, random, every).await;
        }
        session.close();
    }

    async fn check_space(
        &self,
        (session, lane): (&Session, bool),
        space: &Space,
        promises: &Mutex<Promises>,
        random: &mut Random,
        every: bool,
    ) {
        let (rank, generation, keys, durable) = {
            let promises = promises.lock().unwrap();
            (promises.rank, promises.generation, promises.keys, promises.durable.clone())
        };
        let all: Vec<u32> = (0..keys).collect();
        for keys in all.chunks(500) {
            let names: Vec<[u8; 4]> = keys.iter().map(|key| key.to_le_bytes()).collect();
            let (_, there) = session.exists(&[space], &names, MatchMode::Set).await.unwrap();
            for (key, there) in keys.iter().zip(there) {
                assert!(there || !durable.contains(key), "space {rank}: block {key} was durable and is gone");
            }
        }
        let newest = keys.saturating_sub(30);
        let wanted: Vec<u32> =
            all.into_iter().filter(|key| every || *key >= newest || random.percent(4)).collect();
        for keys in wanted.chunks(128) {
            let names: Vec<[u8; 4]> = keys.iter().map(|key| key.to_le_bytes()).collect();
            let found = if lane {
                granted(session, space, &names).await
            } else {
                session.read_within(space, &names, WAIT).await.unwrap()
            };
            let mut seen = self.seen.lock().unwrap();
            for (key, bytes) in keys.iter().zip(found) {
                seen.checked += 1;
                match bytes {
                    Some(bytes) => {
                        let right = content(rank, generation, *key, LOAD_BYTES);
                        assert!(bytes == right, "space {rank}: block {key} came back with other bytes");
                    }
                    None => {
                        seen.misses += 1;
                        let promised = durable.contains(key);
                        assert!(!promised, "space {rank}: block {key} was durable and cannot be read");
                    }
                }
            }
        }
    }
}

impl Promises {
    /// A life begins in which the space has this generation.
    fn began(&mut self, generation: u64) {
        if generation != self.generation {
            let first = self.generation == 0;
            assert!(first || self.clearing, "space {} was cleared by nobody", self.rank);
            assert!(generation > self.generation, "space {} went back to {generation}", self.rank);
            self.cleared(generation);
        }
        self.clearing = false;
    }

    fn cleared(&mut self, generation: u64) {
        self.generation = generation;
        self.keys = 0;
        self.durable.clear();
        self.clearing = false;
    }
}

/// Writes and clears on one session until the daemon is gone.
struct Writer {
    spaces: Vec<Arc<Mutex<Promises>>>,
    seen: Arc<Mutex<Seen>>,
    cut: Arc<AtomicBool>,
    random: Random,
}

impl Writer {
    async fn run(mut self, target: Target) {
        // The daemon may be gone before it has answered at all.
        let Ok(session) = Session::connect(&target).await else { return };
        let mut open = Vec::new();
        for promises in &self.spaces {
            let rank = promises.lock().unwrap().rank;
            let Ok(space) = session.open_space(&manifest_of(rank, LOAD_BYTES)).await else { return };
            promises.lock().unwrap().began(space.generation());
            open.push(space);
        }
        loop {
            let number = self.random.below(2) as usize;
            let promises = Arc::clone(&self.spaces[number]);
            let full = promises.lock().unwrap().keys + 8 > KEYS_MAX;
            let outcome = if full || self.random.percent(2) {
                self.clear(&session, &mut open[number], &promises).await
            } else {
                self.write(&session, &open[number], &promises).await
            };
            match outcome {
                Ok(()) | Err(ClientError::Throttled { .. }) => {}
                Err(_) => return,
            }
        }
    }

    fn is_cut(&self) -> bool {
        self.cut.load(Ordering::SeqCst)
    }

    async fn clear(
        &self,
        session: &Session,
        space: &mut Space,
        promises: &Mutex<Promises>,
    ) -> Result<(), ClientError> {
        let rank = {
            let mut promises = promises.lock().unwrap();
            promises.clearing = true;
            promises.rank
        };
        self.seen.lock().unwrap().clears_cut += 1;
        session.clear(space).await?;
        if self.is_cut() {
            return Err(ClientError::Disconnected);
        }
        {
            let mut seen = self.seen.lock().unwrap();
            seen.clears_cut -= 1;
            seen.clears += 1;
        }
        // From now on nothing older may ever come back.
        let generation = space.generation() + 1;
        promises.lock().unwrap().cleared(generation);
        *space = session.open_space(&manifest_of(rank, LOAD_BYTES)).await?;
        assert_eq!(space.generation(), generation);
        Ok(())
    }

    async fn write(
        &mut self,
        session: &Session,
        space: &Space,
        promises: &Mutex<Promises>,
    ) -> Result<(), ClientError> {
        let count = 1 + self.random.below(8);
        let (rank, generation, first) = {
            let mut promises = promises.lock().unwrap();
            let first = promises.keys;
            promises.keys += count;
            (promises.rank, promises.generation, first)
        };
        let keys: Vec<[u8; 4]> = (first..first + count).map(u32::to_le_bytes).collect();
        let payloads: Vec<_> =
            (first..first + count).map(|key| content(rank, generation, key, LOAD_BYTES)).collect();
        let durable = self.random.percent(70);
        let durability = if durable { Durability::Durable } else { Durability::Readable };
        let outcomes = session.write(space, &keys, None, &payloads, durability).await?;
        if self.is_cut() {
            return Ok(());
        }
        let (mut promises, mut seen) = (promises.lock().unwrap(), self.seen.lock().unwrap());
        for (key, outcome) in (first..).zip(outcomes) {
            seen.written += 1;
            if durable && outcome == SealOutcome::Sealed {
                promises.durable.insert(key);
                seen.durable += 1;
            }
        }
        Ok(())
    }
}
