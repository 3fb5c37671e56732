/* matview
name = "analytics.daily_events"
comment = "Events, users and revenue a day and type"
unique_index_columns = ["day", "event_type"]
*/
SELECT
    (occurred_at AT TIME ZONE 'UTC')::date AS day,
    event_type,
    count(*) AS events,
    count(DISTINCT user_id) AS users,
    coalesce(sum(amount), 0) AS revenue
FROM app.events
GROUP BY 1, 2
