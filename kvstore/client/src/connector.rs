//! A session that comes back after the daemon was away.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::error::ClientError;
use crate::session::{Session, Target};

const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// Holds a [`Target`] and the session with it. Clones share the session.
///
/// A new session knows nothing of the old one's spaces and leases: open the
/// spaces again when [`Session::is_closed`] was true for the one in use.
#[derive(Clone, Debug)]
pub struct Connector {
    target: Arc<Target>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    session: Option<Session>,
    backoff: Duration,
    not_before: Instant,
}

impl Connector {
    /// Connects when first asked for a session.
    pub fn new(target: Target) -> Self {
        let state = State { session: None, backoff: BACKOFF_MIN, not_before: Instant::now() };
        Self { target: Arc::new(target), state: Arc::new(Mutex::new(state)) }
    }

    /// The daemon it connects to.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// The live session, or one attempt at a new one, at most once in the
    /// back-off time (50 ms to 2 s). Cancel-safe.
    ///
    /// # Errors
    /// As [`Session::connect`].
    pub async fn session(&self) -> Result<Session, ClientError> {
        let mut state = self.state.lock().await;
        if let Some(session) = state.session.as_ref().filter(|session| !session.is_closed()) {
            return Ok(session.clone());
        }
        state.session = None;
        tokio::time::sleep_until(state.not_before).await;
        match Session::connect(&self.target).await {
            Ok(session) => {
                state.backoff = BACKOFF_MIN;
                state.not_before = Instant::now() + BACKOFF_MIN;
                state.session = Some(session.clone());
                Ok(session)
            }
            Err(error) => {
                state.not_before = Instant::now() + state.backoff;
                state.backoff = (state.backoff * 2).min(BACKOFF_MAX);
                Err(error)
            }
        }
    }

    /// A live session, however long that takes. An error that waiting cannot
    /// mend (a bad address, a refused token) comes back at once. Cancel-safe.
    ///
    /// # Errors
    /// An error that is not transient.
    pub async fn wait(&self) -> Result<Session, ClientError> {
        loop {
            match self.session().await {
                Err(error) if error.is_transient() => {
                    tracing::debug!(%error, "waiting for the daemon");
                }
                done => return done,
            }
        }
    }
}
