//! A session with one daemon: the spaces that are open in it, and what fetching
//! from its devices costs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use terrace_client::{ClientError, Match, MatchMode, Session, Space, manifest_from_wire, wire};

/// Most spaces that are kept open.
const SPACES_MAX: usize = 64;
/// How old the measured cost of fetching may be.
const COST_AGE_MAX: Duration = Duration::from_secs(1);
/// Blocks whose fetch times are asked for at once.
const SAMPLE_BLOCKS: usize = 32;

/// See the module.
#[derive(Debug)]
pub(super) struct Open {
    session: Session,
    spaces: Mutex<Vec<Arc<OpenSpace>>>,
}

/// One space of one daemon.
#[derive(Debug)]
pub(super) struct OpenSpace {
    manifest: wire::SpaceManifest,
    pub(super) space: Space,
    nvme: Mutex<Cost>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Cost {
    /// Of one block, the queue in front of the device included.
    seconds: Option<f64>,
    asked: Option<Instant>,
}

impl Open {
    pub(super) fn new(session: Session) -> Self {
        Self { session, spaces: Mutex::default() }
    }

    /// Most blocks of one request.
    pub(super) fn blocks_max(&self) -> usize {
        self.session.blocks_max()
    }

    /// The space that a worker reported, opened if it is not yet.
    pub(super) async fn space(&self, manifest: &wire::SpaceManifest) -> Result<Arc<OpenSpace>, ClientError> {
        if let Some(open) = self.spaces().iter().find(|open| open.manifest == *manifest) {
            return Ok(Arc::clone(open));
        }
        let checked = manifest_from_wire(manifest).map_err(|error| {
            tracing::warn!(model = manifest.model, %error, "a worker reported a space that is none");
            ClientError::Protocol { detail: "a worker's space manifest" }
        })?;
        let space = self.session.open_space(&checked).await?;
        let open = Arc::new(OpenSpace { manifest: manifest.clone(), space, nvme: Mutex::default() });
        let mut spaces = self.spaces();
        if spaces.len() == SPACES_MAX {
            spaces.remove(0);
        }
        spaces.push(Arc::clone(&open));
        Ok(open)
    }

    /// The handle may be stale: the next look-up opens the space again.
    pub(super) fn forget(&self, manifest: &wire::SpaceManifest) {
        self.spaces().retain(|open| open.manifest != *manifest);
    }

    /// What the daemon itself says of a prompt.
    pub(super) async fn ask(&self, space: &Space, keys: &[[u8; 16]]) -> Result<Match, ClientError> {
        self.session.match_blocks(&[space], keys, MatchMode::Prefix).await
    }

    /// Asks for blocks so that they are on their way.
    pub(super) async fn prefetch(&self, space: &Space, keys: &[[u8; 16]]) -> Result<(), ClientError> {
        self.session.prefetch(space, keys).await.map(|_| ())
    }

    /// Seconds to fetch a block from a device. Only the daemon knows its queues, so
    /// it is asked for some of `keys`, which are blocks on a device: at once if it
    /// never was, else in the background when the last answer is old.
    pub(super) async fn nvme_seconds(self: &Arc<Self>, space: &Arc<OpenSpace>, keys: &[[u8; 16]]) -> f64 {
        let (seconds, is_old) = {
            let mut cost = space.cost();
            let is_old = cost.asked.is_none_or(|asked| asked.elapsed() > COST_AGE_MAX);
            if is_old {
                cost.asked = Some(Instant::now());
            }
            (cost.seconds, is_old)
        };
        let sample = keys[..keys.len().min(SAMPLE_BLOCKS)].to_vec();
        let asked = Arc::clone(self).sample(Arc::clone(space), sample);
        match seconds {
            None => asked.await,
            Some(_) if is_old => drop(tokio::spawn(asked)),
            Some(_) => {}
        }
        space.cost().seconds.unwrap_or(0.0)
    }

    async fn sample(self: Arc<Self>, space: Arc<OpenSpace>, keys: Vec<[u8; 16]>) {
        let answer = self.session.match_blocks(&[&space.space], &keys, MatchMode::Set).await;
        match answer {
            Ok(answer) => {
                let on_device =
                    |block: &&terrace_client::BlockMatch| block.present && block.tier == wire::Tier::Nvme;
                let times = answer.blocks.iter().filter(on_device).map(|block| block.fetch.as_secs_f64());
                let (count, sum) = times.fold((0u32, 0.0), |(count, sum), time| (count + 1, sum + time));
                if count > 0 {
                    space.cost().seconds = Some(sum / f64::from(count));
                }
            }
            Err(error) => tracing::debug!(%error, "a daemon does not say how long fetching takes"),
        }
    }

    fn spaces(&self) -> MutexGuard<'_, Vec<Arc<OpenSpace>>> {
        // The list is never left half changed.
        self.spaces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OpenSpace {
    fn cost(&self) -> MutexGuard<'_, Cost> {
        // Two words, written one at a time.
        self.nvme.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
