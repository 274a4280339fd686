//! What the store holds of a prompt.
//!
//! Asks the daemon's index over one session that is kept open in the background.
//! A look-up that fails or takes too long is no error: the prompt is placed as
//! if nothing were cached, and the worker finds the blocks by itself.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use terrace_client::{ClientError, Connector, MatchMode, Session, Space, Target, from_wire, wire};
use terrace_core::{TokenCount, chain_keys};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::config::Config;
use crate::metrics::Metrics;
use crate::place::Hit;

/// Most spaces that are kept open.
const SPACES_MAX: usize = 64;
/// Pause after a refusal that waiting alone does not mend.
const PAUSE: Duration = Duration::from_secs(5);

/// Asks the daemon.
#[derive(Debug)]
pub struct Index {
    wait: Duration,
    current: watch::Receiver<Option<Arc<Open>>>,
    keeper: AbortHandle,
}

/// A session and the spaces that it has opened.
#[derive(Debug)]
struct Open {
    session: Session,
    spaces: Mutex<Vec<(wire::SpaceManifest, Space)>>,
}

impl Drop for Index {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Index {
    /// Connects in the background. Call it inside a tokio runtime.
    pub fn start(config: &Config) -> Self {
        let connector = Connector::new(Target {
            socket: config.socket.clone(),
            grpc: Some(config.grpc.clone()),
            tenant: config.tenant.clone(),
            token: config.token.clone(),
            client_name: format!("{} pid {}", config.name, std::process::id()),
        });
        let (publish, current) = watch::channel(None);
        let keeper = tokio::spawn(keep_open(connector, publish)).abort_handle();
        Self { wait: config.index_wait, current, keeper }
    }

    /// What `space` holds of these tokens. Blocks on a slow tier are asked for
    /// at once, so that they are on their way before a worker leases them.
    pub async fn look_up(&self, space: &wire::SpaceManifest, tokens: &[u32], metrics: &Metrics) -> Hit {
        let current = self.current.borrow().clone();
        let Some(open) = current else {
            metrics.index_failed();
            return Hit::default();
        };
        match tokio::time::timeout(self.wait, open.ask(space, tokens)).await {
            Ok(Ok(hit)) => return hit,
            Ok(Err(error)) => {
                tracing::debug!(%error, "the index cannot be asked");
                // The handle may be stale: the next look-up opens the space again.
                open.spaces().retain(|(known, _)| known != space);
            }
            Err(_) => tracing::debug!("the index did not answer in {} ms", self.wait.as_millis()),
        }
        metrics.index_failed();
        Hit::default()
    }
}

impl Open {
    async fn ask(&self, manifest: &wire::SpaceManifest, tokens: &[u32]) -> Result<Hit, ClientError> {
        if manifest.tokens_per_block == 0 {
            return Ok(Hit::default());
        }
        let mut keys = chain_keys(tokens, TokenCount::new(manifest.tokens_per_block));
        keys.truncate(self.session.blocks_max());
        if keys.is_empty() {
            return Ok(Hit::default());
        }
        let space = self.space(manifest).await?;
        let found = self.session.match_blocks(&[&space], &keys, MatchMode::Prefix).await?;
        let prefix = found.blocks.iter().take(found.prefix);
        let fetch: Duration = prefix.clone().map(|block| block.fetch).sum();
        if prefix.clone().any(|block| matches!(block.tier, wire::Tier::Nvme | wire::Tier::Remote)) {
            keys.truncate(found.prefix);
            let session = self.session.clone();
            tokio::spawn(async move {
                if let Err(error) = session.prefetch(&space, &keys).await {
                    tracing::debug!(%error, "blocks could not be asked for in advance");
                }
            });
        }
        Ok(Hit {
            cached_tokens: found.prefix as u64 * u64::from(manifest.tokens_per_block),
            fetch_us: u64::try_from(fetch.as_micros()).unwrap_or(u64::MAX),
        })
    }

    async fn space(&self, manifest: &wire::SpaceManifest) -> Result<Space, ClientError> {
        if let Some((_, space)) = self.spaces().iter().find(|(known, _)| known == manifest) {
            return Ok(space.clone());
        }
        let checked = from_wire(manifest).map_err(|error| {
            tracing::warn!(model = manifest.model, %error, "a worker reported a space that is none");
            ClientError::Protocol { detail: "a worker's space manifest" }
        })?;
        let space = self.session.open_space(&checked).await?;
        let mut spaces = self.spaces();
        if spaces.len() == SPACES_MAX {
            spaces.remove(0);
        }
        spaces.push((manifest.clone(), space.clone()));
        Ok(space)
    }

    fn spaces(&self) -> MutexGuard<'_, Vec<(wire::SpaceManifest, Space)>> {
        // The list is never left half changed.
        self.spaces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Publishes a live session whenever there is one.
async fn keep_open(connector: Connector, publish: watch::Sender<Option<Arc<Open>>>) {
    loop {
        match connector.wait().await {
            Ok(session) => {
                let open = Open { session: session.clone(), spaces: Mutex::default() };
                publish.send_replace(Some(Arc::new(open)));
                session.closed().await;
                publish.send_replace(None);
                tracing::info!(
                    "the session with the daemon ended; prompts are placed without the index until it is back"
                );
            }
            Err(error) => {
                tracing::warn!(%error, "the daemon refuses a session; prompts are placed without the index");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}
