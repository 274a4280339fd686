//! The parts of a running router, and who may come in.

use std::sync::OnceLock;

use crate::admit::{Admission, Caller, Limits, Place, Refused};
use crate::config::Config;
use crate::error::ApiError;
use crate::fleet::Fleet;
use crate::homes::Homes;
use crate::index::Index;
use crate::metrics::Metrics;
use crate::models::Models;
use crate::place::Ties;
use crate::pressure::Pressure;
use crate::publish::Publisher;
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
    /// Who may come in, and whose turn it is.
    pub admission: Admission,
    /// Tells other routers what is cached, if it was asked for.
    pub publisher: OnceLock<Publisher>,
}

impl Router {
    /// Follows the daemons in the background. Call it inside a tokio
    /// runtime.
    ///
    /// # Errors
    /// If the model file that was given cannot be used.
    pub fn new(config: Config) -> anyhow::Result<Self> {
        let models = Models::open(config.model.as_deref(), config.model_name.clone())?;
        let metrics = Metrics::new()?;
        let limits = Limits { requests_max: config.requests_max, queue_max: config.queue_max };
        let admission = Admission::new(limits, metrics.in_progress.clone(), metrics.waiting.clone());
        Ok(Self {
            models,
            fleet: Fleet::default(),
            homes: Homes::default(),
            index: Index::start(&config)?,
            pressure: Pressure::default(),
            metrics,
            admission,
            publisher: OnceLock::new(),
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
    pub fn admit(&self, caller: &Caller) -> Result<Place, ApiError> {
        self.admission.come_in(&caller.tenant).map_err(|refused| self.refuse(&refused))
    }

    /// A refusal as the caller sees it.
    pub fn refuse(&self, refused: &Refused) -> ApiError {
        match refused {
            Refused::Places => {
                self.metrics.refused("places");
                let most = self.config.requests_max;
                ApiError::busy(format!("{most} requests are in progress, which is the limit; retry"))
            }
            Refused::TenantPlaces(most) => {
                self.metrics.refused("tenant_places");
                let message = format!(
                    "{most} of your requests are in progress; the remaining places are kept for others; retry"
                );
                ApiError::busy(message)
            }
            Refused::Queue(seconds) => {
                self.metrics.refused("queue");
                let most = self.config.queue_max;
                let message = format!(
                    "every worker is busy, {most} requests wait, which is the limit, and others have fewer \
                     of them than you; retry"
                );
                ApiError::busy(message).retry_in(*seconds)
            }
        }
    }
}
