//! The parts of a running router, and who may come in.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::config::Config;
use crate::error::ApiError;
use crate::fleet::Fleet;
use crate::homes::Homes;
use crate::index::Index;
use crate::metrics::Metrics;
use crate::models::Models;
use crate::place::Ties;
use crate::pressure::Pressure;
use crate::random;

/// Everything that requests share.
pub struct Router {
    /// Settings.
    pub config: Config,
    /// Models by name.
    pub models: Models,
    /// Workers.
    pub fleet: Fleet,
    /// Which daemon each worker works with.
    pub homes: Homes,
    /// What is cached where.
    pub index: Index,
    /// Sums for planners.
    pub pressure: Pressure,
    /// Sums for operators.
    pub metrics: Metrics,
    places: Arc<Semaphore>,
    queue: Arc<Semaphore>,
}

/// A place among the requests in progress; given back when dropped.
#[derive(Debug)]
pub struct Place {
    _permit: OwnedSemaphorePermit,
    gauge: prometheus::IntGauge,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

impl Router {
    /// Follows the daemons in the background. Call it inside a tokio
    /// runtime.
    ///
    /// # Errors
    /// If the model file that was given cannot be used.
    pub fn new(config: Config) -> anyhow::Result<Self> {
        let models = Models::open(config.model.as_deref(), config.model_name.clone())?;
        Ok(Self {
            models,
            fleet: Fleet::default(),
            homes: Homes::default(),
            index: Index::start(&config)?,
            pressure: Pressure::default(),
            metrics: Metrics::new()?,
            places: Arc::new(Semaphore::new(config.requests_max.min(Semaphore::MAX_PERMITS))),
            queue: Arc::new(Semaphore::new(config.queue_max.min(Semaphore::MAX_PERMITS))),
            config,
        })
    }

    /// How the next request's equals are told apart.
    pub fn ties(&self) -> Ties {
        let temperature = self.config.temperature;
        if temperature > 0.0 { Ties::Drawn { temperature, random: random::share() } } else { Ties::First }
    }

    /// Lets a request in.
    ///
    /// # Errors
    /// 429 when as many as allowed are in progress.
    pub fn admit(&self) -> Result<Place, ApiError> {
        let busy =
            || format!("{} requests are in progress, which is the limit; retry", self.config.requests_max);
        take(&self.places, &self.metrics.in_progress).ok_or_else(|| ApiError::busy(busy()))
    }

    /// Lets a request wait for a worker.
    ///
    /// # Errors
    /// 429 when the queue is full.
    pub fn queue(&self) -> Result<Place, ApiError> {
        let full = || {
            format!(
                "every worker is busy and {} requests wait, which is the limit; retry",
                self.config.queue_max
            )
        };
        take(&self.queue, &self.metrics.waiting).ok_or_else(|| ApiError::busy(full()))
    }
}

fn take(semaphore: &Arc<Semaphore>, gauge: &prometheus::IntGauge) -> Option<Place> {
    let permit = Arc::clone(semaphore).try_acquire_owned().ok()?;
    gauge.inc();
    Some(Place { _permit: permit, gauge: gauge.clone() })
}
