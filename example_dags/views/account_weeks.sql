/* matview
name = "analytics.account_weeks"
comment = "What each account did in each week"
refresh_strategy = "concurrent"
unique_index_columns = ["account_id", "week"]

[[indexes]]
columns = ["week"]
*/
SELECT
    account.id AS account_id,
    account.plan,
    account.country,
    date_trunc('week', event.occurred_at AT TIME ZONE 'UTC')::date AS week,
    count(*) AS events,
    count(DISTINCT event.user_id) AS active_users,
    count(DISTINCT event.session_id) AS sessions,
    count(*) FILTER (WHERE event.event_type = 'purchase') AS purchases,
    count(*) FILTER (WHERE event.event_type = 'error') AS errors,
    coalesce(sum(event.amount) FILTER (WHERE event.event_type = 'purchase'), 0) AS revenue,
    -sum(event.amount) FILTER (WHERE event.event_type = 'refund') AS refunded
FROM app.events AS event
JOIN app.users AS "user" ON "user".id = event.user_id
JOIN app.accounts AS account ON account.id = "user".account_id
GROUP BY 1, 2, 3, 4
