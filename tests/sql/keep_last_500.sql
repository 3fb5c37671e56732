-- Keep last 500 successful runs per view; keep all failures
WITH ranked AS (
  SELECT id, mat_view_definition_id,
         ROW_NUMBER() OVER (PARTITION BY mat_view_definition_id, status ORDER BY created_at DESC) AS rn
  FROM mat_view_runs
  WHERE status = 2 -- success
)
DELETE FROM mat_view_runs
USING ranked
WHERE mat_view_runs.id = ranked.id
  AND ranked.rn > 500;
